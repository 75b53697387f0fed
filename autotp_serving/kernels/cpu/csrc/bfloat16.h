// Single bfloat16 and float32 numbers and their bits.
#pragma once

#include <cstdint>
#include <cstring>

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// To the nearest, halves to even; NaN stays NaN.
inline uint16_t round_bfloat16(float value) {
    const uint32_t bits = as_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

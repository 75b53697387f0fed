// Activations made ready for the kernels: 8-bit integers with a scale per 64, or bfloat16 pairs.
//
// Tokens lie in chunks of 16, and within a chunk block by block, so that a kernel finds all it
// needs of a block at fixed distances from one pointer; the codes of a block are an AMX tile.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "bfloat16.h"

constexpr int kBlock = 64;
constexpr int kChunk = 16;

// `scale`, `base` and `sum` are of one token each: value = code * scale; `base` is minus the sum
// of codes times what the weight codes are too large by; `sum` is that of the values.
struct alignas(64) ByteBlock {
    int8_t codes[kChunk][kBlock];
    float scale[kChunk];
    int32_t base[kChunk];
    float sum[kChunk];
};

// Within each four numbers the order is 0, 2, 1, 3 (see look_up_pairs).
struct alignas(64) PairBlock {
    uint16_t values[kChunk][kBlock];
};

// Reads 64 numbers of one token, with zeros beyond `count`.
inline void read_block(const float* from, int64_t count, float* to) {
    std::memset(to, 0, kBlock * sizeof(float));
    std::memcpy(to, from, count * sizeof(float));
}
inline void read_block(const uint16_t* from, int64_t count, float* to) {
    if (count < kBlock) std::memset(to, 0, kBlock * sizeof(float));
    for (int64_t i = 0; i < count; ++i) to[i] = as_float(static_cast<uint32_t>(from[i]) << 16);
}

// `unit` is what one step of the weight codes stands for, `offset` the code that stands for 0.
//
// A block that holds infinity or NaN gives NaN, as any sum over it would. One whose largest
// magnitude is below 2**-119 counts as zero: its inverse scale would be infinite.
inline void prepare(ByteBlock& block, int token, const float* values, float unit, int offset) {
    // As integers, magnitudes keep their order and NaN is the largest.
    uint32_t largest = 0;
    for (int i = 0; i < kBlock; ++i) {
        const uint32_t magnitude = as_bits(values[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    const float peak = as_float(largest);
    const bool finite = largest < 0x7f800000, tiny = peak < 0x1p-119f;
    const float scale = tiny ? 0.0f : finite ? peak / 127.0f : NAN;
    const float inverse = tiny || !finite ? 0.0f : 127.0f / peak;
    // Adding 1.5 * 2**23 leaves the nearest integer, halves to even, in the lowest bits.
    constexpr float kRounder = 12582912.0f;
    int32_t sum = 0;
    int8_t* codes = block.codes[token];
    for (int i = 0; i < kBlock; ++i) {
        const float scaled = finite ? values[i] * inverse : 0.0f;
        const int32_t code = static_cast<int32_t>(as_bits(scaled + kRounder) - as_bits(kRounder));
        codes[i] = static_cast<int8_t>(code);
        sum += code;
    }
    block.scale[token] = scale * unit;
    block.base[token] = -offset * sum;
    block.sum[token] = scale * static_cast<float>(sum);
}

inline void prepare(PairBlock& block, int token, const float* values, float, int) {
    uint16_t* to = block.values[token];
    for (int i = 0; i < kBlock; i += 4) {
        to[i] = round_bfloat16(values[i]);
        to[i + 1] = round_bfloat16(values[i + 2]);
        to[i + 2] = round_bfloat16(values[i + 1]);
        to[i + 3] = round_bfloat16(values[i + 3]);
    }
}

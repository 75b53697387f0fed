// How keys and values lie in the cache that the CPU's attention reads: as its products take them.
//
// Slots stand in groups of 16, a block being one or more groups. A group's keys of one head are
// words of two numbers, [head_dim / 2][16 slots]; its values are words of two slots' numbers,
// [8 pairs of slots][value_dim]. Groups are [kv_heads] of these. Numbers are bfloat16, or int8 with
// a float for each slot and head, [kv_heads][16 slots] of a group, that they are multiplied by.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include ISA_VECTORS

#include "bfloat16.h"

constexpr int64_t kGroupSlots = 16;

// A layer's keys and values; without scales they are bfloat16.
struct AutotpPools {
    void* keys;
    void* values;
    float* key_scales;
    float* value_scales;
};

// Where the keys, or values, of a group's head begin; `size` is that of the head, 1 for scales.
inline int64_t find_head(int64_t group, int64_t head, int64_t kv_heads, int64_t size) {
    return (group * kv_heads + head) * size * kGroupSlots;
}

constexpr float kSmallestDivisor = 1e-30f;

// Rounds a row by its largest number to whole ones up to `largest_code`, in 8 or 16 bits, and
// returns what to multiply them by; NaN if one is. `size` is a multiple of 16.
template <class Code>
inline float round_row(const uint16_t* row, Code* codes, int64_t size, float largest_code) {
    Ints magnitudes = same_int(0);
    for (int64_t i = 0; i < size; i += kGroupSlots) {
        magnitudes = larger_int(magnitudes, magnitude_bits(load_bfloat16(row + i)));
    }
    const float largest = as_float(static_cast<uint32_t>(largest_int(magnitudes)));
    const Floats inverse = same_float(largest_code / std::max(largest, kSmallestDivisor));
    for (int64_t i = 0; i < size; i += kGroupSlots) {
        const Floats numbers = multiply(load_bfloat16(row + i), inverse);
        if constexpr (sizeof(Code) == 1) {
            store_as_int8(codes + i, numbers);
        } else {
            store_as_int16(codes + i, numbers);
        }
    }
    return largest / largest_code;
}

// As `quantize` of kv_pools.py.
inline float quantize(const uint16_t* row, int8_t* codes, int64_t size) {
    return round_row(row, codes, size, 127);
}

// Puts a row's numbers into a slot of a group: words of `word` numbers, `stride` numbers apart.
template <int kWord, class Number>
inline void scatter(const Number* from, Number* to, int64_t size, int64_t stride) {
    for (int64_t i = 0; i < size; i += kWord) {
        std::memcpy(to + i / kWord * stride, from + i, kWord * sizeof(Number));
    }
}

// Stores a token's keys and values of one head.
struct HeadWriter {
    const AutotpPools& pools;
    int64_t slot, head, kv_heads;

    void store_key(const uint16_t* key, int64_t size) const {
        store(key, size, pools.keys, pools.key_scales, [&](const auto* from, auto* to) {
            scatter<2>(from, to + slot % kGroupSlots * 2, size, kGroupSlots * 2);
        });
    }
    void store_value(const uint16_t* value, int64_t size) const {
        store(value, size, pools.values, pools.value_scales, [&](const auto* from, auto* to) {
            scatter<1>(from, to + slot % kGroupSlots / 2 * size * 2 + slot % 2, size, 2);
        });
    }

  private:
    template <class Scatter>
    void store(const uint16_t* row, int64_t size, void* pool, float* scales,
               const Scatter& scatter_row) const {
        const int64_t group = slot / kGroupSlots;
        const int64_t start = find_head(group, head, kv_heads, size);
        if (!scales) return scatter_row(row, static_cast<uint16_t*>(pool) + start);
        constexpr int64_t kPiece = 512;  // of a row's codes
        int8_t codes[kPiece];
        scales[find_head(group, head, kv_heads, 1) + slot % kGroupSlots] =
            quantize(row, codes, size);
        scatter_row(codes, static_cast<int8_t*>(pool) + start);
    }
};

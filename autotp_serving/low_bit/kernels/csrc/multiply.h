// Products of 16 weight rows with a few tokens: the inner loops, on one thread.
//
// A token's result depends on nothing but its own numbers and the weights: the order in which
// they are summed is the same whatever stands beside it.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "codes.h"

// How far ahead of its use a weight is asked for: what arrives during a memory access's time.
constexpr int kAhead = 2048;

template <size_t... kIndex, class Body>
inline void unroll(std::index_sequence<kIndex...>, const Body& body) {
    (body(std::integral_constant<int, static_cast<int>(kIndex)>{}), ...);
}

// Calls body with 0, 1, ... kCount - 1 as constants.
template <int kCount, class Body>
inline void unroll(const Body& body) {
    unroll(std::make_index_sequence<kCount>{}, body);
}

template <int kBytes>
inline void prefetch(const uint8_t* from) {
    for (int i = 0; i < kBytes; i += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(from + kAhead + i), _MM_HINT_T0);
    }
}

// What every tile is decoded with.
struct Tables {
    Bytes bytes;
    PairTable pairs;
};

// sums[m] += tiles of `group` times token `first + m` of the chunk at `x`.
template <class F, int kTokens>
inline void multiply(const Group& group, const ByteBlock* x, int first, int64_t tiles,
                     const Tables& tables, Floats* sums) {
    // With VNNI high nibbles are multiplied where they stand, sixteen times too large, which
    // saves shifting them.
    constexpr bool kNibbles = F::kLow == 4 && F::kHigh == 0 && F::kKind == Kind::kCodes &&
                              kAnyByteFits;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const ByteBlock& block = x[tile];
        const int8_t(*codes)[kBlock] = block.codes + first;
        const uint8_t* low = group.codes + tile * F::kLowBytes;
        const uint8_t* high = group.high + tile * F::kHighBytes;
        prefetch<F::kLowBytes>(low);
        Ints totals[kTokens];
        for (int m = 0; m < kTokens; ++m) {
            totals[m] = same_int(F::kMins ? 0 : block.base[first + m]);
        }
        if constexpr (kNibbles) {
            Ints upper[kTokens];
            for (int m = 0; m < kTokens; ++m) upper[m] = same_int(0);
            unroll<kWords / 2>([&](auto word) {
                const Bytes packed = load_bytes(low + word * 64);
                const Bytes lower_codes = both(packed, same_bytes(0x0f));
                const Bytes upper_codes = both(packed, same_bytes(0xf0));
                for (int m = 0; m < kTokens; ++m) {
                    const int8_t* token = codes[m];
                    totals[m] =
                        dot_bytes<false>(totals[m], lower_codes, load_int32(token + word * 4));
                    upper[m] =
                        dot_bytes<true>(upper[m], upper_codes, load_int32(token + 32 + word * 4));
                }
            });
            for (int m = 0; m < kTokens; ++m) totals[m] = add(totals[m], sixteenth(upper[m]));
        } else {
            unroll<kWords>([&](auto word) {
                const Bytes weights = load_codes<F, word>(low, high, tables.bytes);
                for (int m = 0; m < kTokens; ++m) {
                    totals[m] =
                        dot_bytes<F::kWide>(totals[m], weights, load_int32(codes[m] + word * 4));
                }
            });
        }
        const Floats scales = load_scales<F>(group, tile);
        for (int m = 0; m < kTokens; ++m) {
            const Floats factor = multiply(scales, same_float(block.scale[first + m]));
            sums[m] = multiply_add(to_floats(totals[m]), factor, sums[m]);
        }
        if constexpr (F::kMins) {
            const Floats mins = load_halves(group.mins + tile * kRows);
            for (int m = 0; m < kTokens; ++m) {
                sums[m] = multiply_add(mins, same_float(block.sum[first + m]), sums[m]);
            }
        }
    }
}

template <class F, int kTokens>
inline void multiply(const Group& group, const PairBlock* x, int first, int64_t tiles,
                     const Tables& tables, Floats* sums) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const uint16_t(*values)[kBlock] = x[tile].values + first;
        const uint8_t* low = group.codes + tile * F::kLowBytes;
        const uint8_t* high = group.high + tile * F::kHighBytes;
        prefetch<F::kLowBytes>(low);
        Floats totals[kTokens];
        for (int m = 0; m < kTokens; ++m) {
            totals[m] = F::kScale == Scale::kNone ? sums[m] : same_float(0);
        }
        unroll<kWords>([&](auto word) {
            const Pairs weights =
                look_up_pairs(tables.pairs, load_codes<F, word>(low, high, tables.bytes));
            for (int m = 0; m < kTokens; ++m) {
                const uint16_t* token = values[m] + word * 4;
                totals[m] = dot_pairs(totals[m], weights.even, load_int32(token));
                totals[m] = dot_pairs(totals[m], weights.odd, load_int32(token + 2));
            }
        });
        if constexpr (F::kScale == Scale::kNone) {
            for (int m = 0; m < kTokens; ++m) sums[m] = totals[m];
        } else {
            const Floats scales = load_scales<F>(group, tile);
            for (int m = 0; m < kTokens; ++m) sums[m] = multiply_add(totals[m], scales, sums[m]);
        }
    }
}

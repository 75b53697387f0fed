// Products of 16 weight rows with a few tokens: the inner loops, on one thread.
//
// A token's result depends on nothing but its own numbers and the weights: the order in which
// they are summed is the same whatever stands beside it.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include ISA_TILES

#include "codes.h"

template <size_t... kIndex, class Body>
inline void unroll(std::index_sequence<kIndex...>, const Body& body) {
    (body(std::integral_constant<int, static_cast<int>(kIndex)>{}), ...);
}

// Calls body with 0, 1, ... kCount - 1 as constants.
template <int kCount, class Body>
inline void unroll(const Body& body) {
    unroll(std::make_index_sequence<kCount>{}, body);
}

// Asks for a tile's codes some tiles ahead. While memory sets the pace the processor's own
// prefetcher is best left alone; once there is more work per byte it falls behind, and what is
// asked for only a few KiB ahead comes too late.
template <class F, int kTokens>
inline void prefetch(const uint8_t* from) {
    constexpr int kAhead = 16384;
    constexpr int kWork = kTokens * (F::kKind == Kind::kPairs ? 2 : 1) * 1024 / F::kLowBytes;
    if constexpr (kWork >= 5) {
        for (int i = 0; i < F::kLowBytes; i += 64) {
            prefetch_far(from + kAhead + i);
        }
    }
}

// What every tile is decoded with.
struct Tables {
    Bytes bytes;
    PairTable pairs;
};

// Bytes of a tile whose codes have been decoded: a vector per word, or two of pairs.
template <class F>
constexpr int64_t kDecodedBytes = kWords * (F::kKind == Kind::kPairs ? 128 : 64);

// Decodes the tiles of a group once, for many tokens; integer codes become smaller by `offset`.
template <class F>
inline void decode(const Group& group, int64_t tiles, const Tables& tables, int32_t offset,
                   uint8_t* to) {
    const Bytes offsets = same_bytes(static_cast<uint8_t>(offset));
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const uint8_t* low = group.codes + tile * F::kLowBytes;
        const uint8_t* high = group.high + tile * F::kHighBytes;
        unroll<kWords>([&](auto word) {
            const Bytes codes = load_codes<F, word>(low, high, tables.bytes);
            if constexpr (F::kKind == Kind::kPairs) {
                const Pairs pairs = look_up_pairs(tables.pairs, codes);
                store_bytes(to + word * 128, pairs.even);
                store_bytes(to + word * 128 + 64, pairs.odd);
            } else {
                store_bytes(to + word * 64, subtract(codes, offsets));
            }
        });
        to += kDecodedBytes<F>;
    }
}

// The sums over one block of `kTokens` tokens from `first`, times 16 rows' codes, as integers.
template <class F, int kTokens, bool kDecoded>
inline void dot_tile(const Group& group, int64_t tile, const ByteBlock& block, int first,
                     const Tables& tables, Ints* totals) {
    const int8_t(*codes)[kBlock] = block.codes + first;
    const uint8_t* low = group.codes + tile * F::kLowBytes;
    const uint8_t* high = group.high + tile * F::kHighBytes;
    if constexpr (!kDecoded && kAnyByteFits && F::kLow == 4 && F::kHigh == 0 &&
                  F::kKind == Kind::kCodes) {
        // High nibbles are multiplied where they stand, sixteen times too large, which saves
        // shifting them.
        Ints upper[kTokens];
        for (int m = 0; m < kTokens; ++m) upper[m] = same_int(0);
        unroll<kWords / 2>([&](auto word) {
            const Bytes packed = load_bytes(low + word * 64);
            const Bytes lower_codes = both(packed, same_bytes(0x0f));
            const Bytes upper_codes = both(packed, same_bytes(0xf0));
            for (int m = 0; m < kTokens; ++m) {
                const int8_t* x = codes[m] + word * 4;
                totals[m] = dot_bytes<false>(totals[m], lower_codes, load_int32(x));
                upper[m] = dot_bytes<true>(upper[m], upper_codes, load_int32(x + kBlock / 2));
            }
        });
        for (int m = 0; m < kTokens; ++m) totals[m] = add(totals[m], sixteenth(upper[m]));
    } else {
        const uint8_t* decoded = group.decoded + tile * kDecodedBytes<F>;
        // With 32 registers the sums of every other word are kept apart, and wait for each other
        // half as long; a few tokens wait for memory anyway.
        constexpr bool kApart = kMaxTokens >= 8 && kTokens >= 6;
        Ints others[kTokens];
        for (int m = 0; m < kTokens; ++m) others[m] = same_int(0);
        unroll<kWords>([&](auto word) {
            const Bytes weights = kDecoded ? load_bytes(decoded + word * 64)
                                           : load_codes<F, word>(low, high, tables.bytes);
            Ints* const to = kApart && word % 2 ? others : totals;
            for (int m = 0; m < kTokens; ++m) {
                to[m] = dot_bytes<F::kWide>(to[m], weights, load_int32(codes[m] + word * 4));
            }
        });
        if constexpr (kApart) {
            for (int m = 0; m < kTokens; ++m) totals[m] = add(totals[m], others[m]);
        }
    }
}

// sums[m] += tiles of `group` times token `first + m` of the chunk at `x`. Flat, since gcc stops
// inlining the unrolled words at some size, which costs two thirds of the speed.
template <class F, int kTokens, bool kDecoded>
__attribute__((flatten))
inline void multiply(const Group& group, const ByteBlock* x, int first, int64_t tiles,
                     const Tables& tables, Floats* sums) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const ByteBlock& block = x[tile];
        if constexpr (!kDecoded) prefetch<F, kTokens>(group.codes + tile * F::kLowBytes);
        Ints totals[kTokens];
        for (int m = 0; m < kTokens; ++m) {
            totals[m] = same_int(F::kMins ? 0 : block.base[first + m]);
        }
        dot_tile<F, kTokens, kDecoded>(group, tile, block, first, tables, totals);
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

template <class F, int kTokens, bool kDecoded>
__attribute__((flatten))
inline void multiply(const Group& group, const PairBlock* x, int first, int64_t tiles,
                     const Tables& tables, Floats* sums) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const uint16_t(*values)[kBlock] = x[tile].values + first;
        const uint8_t* low = group.codes + tile * F::kLowBytes;
        const uint8_t* high = group.high + tile * F::kHighBytes;
        const uint8_t* decoded = group.decoded + tile * kDecodedBytes<F>;
        if constexpr (!kDecoded) prefetch<F, kTokens>(low);
        // Apart, the two sums wait for each other half as long.
        Floats even[kTokens], odd[kTokens];
        for (int m = 0; m < kTokens; ++m) even[m] = odd[m] = same_float(0);
        unroll<kWords>([&](auto word) {
            Pairs weights;
            if constexpr (kDecoded) {
                weights = {load_bytes(decoded + word * 128), load_bytes(decoded + word * 128 + 64)};
            } else {
                weights = look_up_pairs(tables.pairs, load_codes<F, word>(low, high, tables.bytes));
            }
            for (int m = 0; m < kTokens; ++m) {
                const uint16_t* token = values[m] + word * 4;
                even[m] = dot_pairs(even[m], weights.even, load_int32(token));
                odd[m] = dot_pairs(odd[m], weights.odd, load_int32(token + 2));
            }
        });
        Floats scales = same_float(1);
        if constexpr (F::kScale != Scale::kNone) scales = load_scales<F>(group, tile);
        for (int m = 0; m < kTokens; ++m) {
            sums[m] = multiply_add(add(even[m], odd[m]), scales, sums[m]);
        }
    }
}

// Formats of which two groups at a time are multiplied with four tokens: each activation is fetched
// once for both. That takes 32 registers. Those of pairs are decoded first.
template <class F>
constexpr bool kInPairs =
    kMaxTokens >= 8 && (F::kKind == Kind::kPairs ||
                        (F::kKind == Kind::kCodes && F::kHigh == 0 && !F::kMins));
constexpr int kPairTokens = 4;

// sums[g][m] = group g of two times token `first + m` of the chunk at `x`.
template <class F, int kTokens>
__attribute__((flatten))
inline void multiply_pair(const Group (&groups)[2], const ByteBlock* x, int first, int64_t tiles,
                          Floats (&sums)[2][kTokens]) {
    for (int m = 0; m < kTokens; ++m) sums[0][m] = sums[1][m] = same_float(0);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const ByteBlock& block = x[tile];
        const int8_t(*codes)[kBlock] = block.codes + first;
        const uint8_t* one = groups[0].codes + tile * F::kLowBytes;
        const uint8_t* two = groups[1].codes + tile * F::kLowBytes;
        Ints totals[2][kTokens];
        const auto add_word = [&](Bytes first_codes, Bytes second_codes, int column) {
            for (int m = 0; m < kTokens; ++m) {
                const int32_t number = load_int32(codes[m] + column);
                totals[0][m] = dot_bytes<F::kWide>(totals[0][m], first_codes, number);
                totals[1][m] = dot_bytes<F::kWide>(totals[1][m], second_codes, number);
            }
        };
        if constexpr (F::kLow == 4) {
            // High nibbles first, sixteen times too large: two sets of totals would not fit.
            const Bytes upper = same_bytes(0xf0), lower = same_bytes(0x0f);
            for (int m = 0; m < kTokens; ++m) totals[0][m] = totals[1][m] = same_int(0);
            unroll<kWords / 2>([&](auto word) {
                add_word(both(load_bytes(one + word * 64), upper),
                         both(load_bytes(two + word * 64), upper), word * 4 + kBlock / 2);
            });
            for (int m = 0; m < kTokens; ++m) {
                const Ints base = same_int(block.base[first + m]);
                totals[0][m] = add(sixteenth(totals[0][m]), base);
                totals[1][m] = add(sixteenth(totals[1][m]), base);
            }
            unroll<kWords / 2>([&](auto word) {
                add_word(both(load_bytes(one + word * 64), lower),
                         both(load_bytes(two + word * 64), lower), word * 4);
            });
        } else {
            for (int m = 0; m < kTokens; ++m) {
                totals[0][m] = totals[1][m] = same_int(block.base[first + m]);
            }
            unroll<kWords>([&](auto word) {
                add_word(load_codes<F, word>(one, nullptr, Bytes{}),
                         load_codes<F, word>(two, nullptr, Bytes{}), word * 4);
            });
        }
        for (int g = 0; g < 2; ++g) {
            const Floats scales = load_scales<F>(groups[g], tile);
            for (int m = 0; m < kTokens; ++m) {
                const Floats factor = multiply(scales, same_float(block.scale[first + m]));
                sums[g][m] = multiply_add(to_floats(totals[g][m]), factor, sums[g][m]);
            }
        }
    }
}

// The same of two groups that are decoded; summed as in `multiply`.
template <class F, int kTokens>
inline void multiply_pair(const Group (&groups)[2], const PairBlock* x, int first, int64_t tiles,
                          Floats (&sums)[2][kTokens]) {
    for (int m = 0; m < kTokens; ++m) sums[0][m] = sums[1][m] = same_float(0);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const uint16_t(*values)[kBlock] = x[tile].values + first;
        const int64_t from = tile * kDecodedBytes<F>;
        Floats even[2][kTokens], odd[2][kTokens];
        for (int g = 0; g < 2; ++g) {
            for (int m = 0; m < kTokens; ++m) even[g][m] = odd[g][m] = same_float(0);
        }
        unroll<kWords>([&](auto word) {
            const auto add_pairs = [&](Floats(&totals)[2][kTokens], int half) {
                const int64_t at = from + word * 128 + half * 64;
                const Bytes one = load_bytes(groups[0].decoded + at);
                const Bytes two = load_bytes(groups[1].decoded + at);
                for (int m = 0; m < kTokens; ++m) {
                    const int32_t pair = load_int32(values[m] + word * 4 + half * 2);
                    totals[0][m] = dot_pairs(totals[0][m], one, pair);
                    totals[1][m] = dot_pairs(totals[1][m], two, pair);
                }
            };
            add_pairs(even, 0);
            add_pairs(odd, 1);
        });
        for (int g = 0; g < 2; ++g) {
            Floats scales = same_float(1);
            if constexpr (F::kScale != Scale::kNone) scales = load_scales<F>(groups[g], tile);
            for (int m = 0; m < kTokens; ++m) {
                sums[g][m] = multiply_add(add(even[g][m], odd[g][m]), scales, sums[g][m]);
            }
        }
    }
}

// sums[m] = tiles of a decoded `group` times token m of the chunk at `x`, for all its tokens.
template <class F>
inline void multiply_chunk(const Group& group, const ByteBlock* x, int64_t tiles, Floats* to) {
    Floats sums[kChunk];
    for (int m = 0; m < kChunk; ++m) sums[m] = same_float(0);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const ByteBlock& block = x[tile];
        alignas(64) int32_t product[kChunk * kRows];
        multiply_tile(block, group.decoded + tile * kDecodedBytes<F>, product);
        const Floats scales = load_scales<F>(group, tile);
        for (int m = 0; m < kChunk; ++m) {
            const Floats factor = multiply(scales, same_float(block.scale[m]));
            const Floats totals = to_floats(load_bytes(product + m * kRows));
            sums[m] = multiply_add(totals, factor, sums[m]);
        }
        if constexpr (F::kMins) {
            const Floats mins = load_halves(group.mins + tile * kRows);
            for (int m = 0; m < kChunk; ++m) {
                sums[m] = multiply_add(mins, same_float(block.sum[m]), sums[m]);
            }
        }
    }
    for (int m = 0; m < kChunk; ++m) to[m] = sums[m];
}

template <class F>
inline void multiply_chunk(const Group& group, const PairBlock* x, int64_t tiles, Floats* to) {
    Floats sums[kChunk];
    for (int m = 0; m < kChunk; ++m) sums[m] = same_float(0);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        alignas(64) float product[kChunk * kRows];
        multiply_tile(x[tile], group.decoded + tile * kDecodedBytes<F>, product);
        Floats scales = same_float(1);
        if constexpr (F::kScale != Scale::kNone) scales = load_scales<F>(group, tile);
        for (int m = 0; m < kChunk; ++m) {
            sums[m] = multiply_add(load_floats(product + m * kRows), scales, sums[m]);
        }
    }
    for (int m = 0; m < kChunk; ++m) to[m] = sums[m];
}

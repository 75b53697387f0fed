// 512-bit vectors as two of 256, by AVX2, FMA and F16C; the same names as vectors_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "bfloat16.h"
#include "prefetch.h"

struct Bytes {
    __m256i first, second;
};
using Ints = Bytes;
struct Floats {
    __m256 first, second;
};

// More tokens than these would not fit in the 16 registers.
constexpr int kMaxTokens = 4;

inline int32_t load_int32(const void* from) {
    int32_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline __m256i load_half_vector(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
inline Bytes load_bytes(const void* from) {
    return {load_half_vector(from), load_half_vector(static_cast<const char*>(from) + 32)};
}
inline void store_bytes(void* to, Bytes a) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), a.first);
    _mm256_storeu_si256(static_cast<__m256i*>(to) + 1, a.second);
}
inline Bytes twice(__m256i a) { return {a, a}; }
inline Bytes same_bytes(uint8_t value) { return twice(_mm256_set1_epi8(static_cast<char>(value))); }
inline Bytes both(Bytes a, Bytes b) {
    return {_mm256_and_si256(a.first, b.first), _mm256_and_si256(a.second, b.second)};
}
inline Bytes either(Bytes a, Bytes b) {
    return {_mm256_or_si256(a.first, b.first), _mm256_or_si256(a.second, b.second)};
}
inline Bytes flip(Bytes a, Bytes b) {
    return {_mm256_xor_si256(a.first, b.first), _mm256_xor_si256(a.second, b.second)};
}
inline Bytes subtract(Bytes a, Bytes b) {
    return {_mm256_sub_epi8(a.first, b.first), _mm256_sub_epi8(a.second, b.second)};
}
template <int kBits>
Bytes shift_right(Bytes a) {
    return {_mm256_srli_epi32(a.first, kBits), _mm256_srli_epi32(a.second, kBits)};
}
template <int kBits>
Bytes shift_left(Bytes a) {
    return {_mm256_slli_epi32(a.first, kBits), _mm256_slli_epi32(a.second, kBits)};
}

// Byte j of each row becomes `value` where bit j of the row's number is set, else 0.
inline Bytes spread_bits(Ints bits, Bytes value) {
    const __m256i lowest = _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c,  //
                                             0, 0x04040404, 0x08080808, 0x0c0c0c0c);
    const __m256i mask = _mm256_set1_epi32(0x08040201);
    const auto spread = [&](__m256i half) {
        const __m256i bit = _mm256_and_si256(_mm256_shuffle_epi8(half, lowest), mask);
        return _mm256_cmpeq_epi8(bit, mask);
    };
    return both({spread(bits.first), spread(bits.second)}, value);
}

// Entry `index` (below 16) of a table of 16 bytes, for each byte.
inline Bytes load_table(const uint8_t* table) {
    return twice(_mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(table))));
}
inline Bytes look_up(Bytes table, Bytes index) {
    return {_mm256_shuffle_epi8(table.first, index.first),
            _mm256_shuffle_epi8(table.second, index.second)};
}

inline Ints same_int(int32_t value) { return twice(_mm256_set1_epi32(value)); }
inline Ints add(Ints a, Ints b) {
    return {_mm256_add_epi32(a.first, b.first), _mm256_add_epi32(a.second, b.second)};
}
inline Ints sixteenth(Ints a) {
    return {_mm256_srai_epi32(a.first, 4), _mm256_srai_epi32(a.second, 4)};
}

// Adds to each row the product of its four unsigned bytes with the same four signed ones. The
// quick way adds pairs in 16 bits, which codes up to 128 cannot overflow; `kWide` allows any.
template <bool kWide>
Ints dot_bytes(Ints sum, Bytes weights, int32_t x) {
    const __m256i tokens = _mm256_set1_epi32(x);
    const auto dot = [&](__m256i half) {
        if constexpr (kWide) {
            const __m256i low_bytes = _mm256_set1_epi16(0x00ff);
            const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(tokens, 8), 8);
            const __m256i odd = _mm256_srai_epi16(tokens, 8);
            return _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(half, low_bytes), even),
                                    _mm256_madd_epi16(_mm256_srli_epi16(half, 8), odd));
        } else {
            return _mm256_madd_epi16(_mm256_maddubs_epi16(half, tokens), _mm256_set1_epi16(1));
        }
    };
    return add(sum, {dot(weights.first), dot(weights.second)});
}
constexpr bool kAnyByteFits = false;

inline Floats same_float(float value) {
    return {_mm256_set1_ps(value), _mm256_set1_ps(value)};
}
inline Floats as_floats(Bytes bits) {
    return {_mm256_castsi256_ps(bits.first), _mm256_castsi256_ps(bits.second)};
}
inline Floats load_floats(const float* from) {
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
inline Floats load_halves(const uint16_t* from) {
    const auto load = [](const uint16_t* half) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half)));
    };
    return {load(from), load(from + 8)};
}
// Of 16 pairs of halves, those at the lower or the upper places.
inline Floats lower_halves(Bytes pairs) {
    const auto convert = [](__m256i eight) {
        const __m256i lower = _mm256_and_si256(eight, _mm256_set1_epi32(0xffff));
        return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(lower),
                                                _mm256_extracti128_si256(lower, 1)));
    };
    return {convert(pairs.first), convert(pairs.second)};
}
inline Floats upper_halves(Bytes pairs) { return lower_halves(shift_right<16>(pairs)); }
inline void store_halves(uint16_t* to, Floats a, int count) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    __m128i halves[2] = {_mm256_cvtps_ph(a.first, kNearest), _mm256_cvtps_ph(a.second, kNearest)};
    std::memcpy(to, halves, count * sizeof *to);
}
inline Floats load_bfloat16(const uint16_t* from) {
    const auto load = [](const uint16_t* eight) {
        const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(eight));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(numbers), 16));
    };
    return {load(from), load(from + 8)};
}
inline Floats to_floats(Ints a) {
    return {_mm256_cvtepi32_ps(a.first), _mm256_cvtepi32_ps(a.second)};
}
inline Floats multiply(Floats a, Floats b) {
    return {_mm256_mul_ps(a.first, b.first), _mm256_mul_ps(a.second, b.second)};
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.first, b.first, c.first),
            _mm256_fmadd_ps(a.second, b.second, c.second)};
}

inline void store_floats(float* to, Floats a, int count) {
    float values[16];
    _mm256_storeu_ps(values, a.first);
    _mm256_storeu_ps(values + 8, a.second);
    std::memcpy(to, values, count * sizeof(float));
}

// A table of 128 bfloat16 numbers, their upper and their lower bytes apart. AVX2 looks up 16 at a
// time.
struct PairTable {
    Bytes upper[8], lower[8];
};
inline PairTable load_pair_table(const uint8_t* upper, const uint8_t* lower) {
    PairTable table;
    for (int i = 0; i < 8; ++i) {
        table.upper[i] = load_table(upper + 16 * i);
        table.lower[i] = load_table(lower + 16 * i);
    }
    return table;
}

// Four codes per row become two pairs of bfloat16: of codes 0 and 2, and of codes 1 and 3. Bit 7
// of a code is the sign.
struct Pairs {
    Bytes even, odd;
};
inline Pairs look_up_pairs(const PairTable& table, Bytes codes) {
    const Bytes low = both(codes, same_bytes(0x0f));
    const Bytes high = both(shift_right<4>(codes), same_bytes(0x07));
    Bytes upper = both(codes, same_bytes(0x80)), lower = same_bytes(0);
    for (int i = 0; i < 8; ++i) {
        const __m256i part = _mm256_set1_epi8(static_cast<char>(i));
        const Bytes here = {_mm256_cmpeq_epi8(high.first, part),
                            _mm256_cmpeq_epi8(high.second, part)};
        upper = either(upper, both(here, look_up(table.upper[i], low)));
        lower = either(lower, both(here, look_up(table.lower[i], low)));
    }
    const auto even_words = [](__m256i upper_half, __m256i lower_half) {
        return _mm256_blendv_epi8(_mm256_slli_epi16(upper_half, 8), lower_half,
                                  _mm256_set1_epi16(0x00ff));
    };
    const auto odd_words = [](__m256i upper_half, __m256i lower_half) {
        return _mm256_blendv_epi8(upper_half, _mm256_srli_epi16(lower_half, 8),
                                  _mm256_set1_epi16(0x00ff));
    };
    return {{even_words(upper.first, lower.first), even_words(upper.second, lower.second)},
            {odd_words(upper.first, lower.first), odd_words(upper.second, lower.second)}};
}

inline Floats dot_pairs(Floats sum, Bytes weights, int32_t x) {
    const __m256 low = _mm256_castsi256_ps(_mm256_set1_epi32(x << 16));
    const __m256 high = _mm256_castsi256_ps(_mm256_set1_epi32(x & static_cast<int32_t>(0xffff0000)));
    const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
    const auto dot = [&](__m256 total, __m256i half) {
        total = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(half, 16)), low, total);
        return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(half, mask)), high, total);
    };
    return {dot(sum.first, weights.first), dot(sum.second, weights.second)};
}

// Of 16 pairs of bfloat16, those at the lower or the upper places.
inline Floats lower_bfloat16(Bytes pairs) {
    const Bytes moved = shift_left<16>(pairs);
    return {_mm256_castsi256_ps(moved.first), _mm256_castsi256_ps(moved.second)};
}
inline Floats upper_bfloat16(Bytes pairs) {
    const Bytes kept = both(pairs, same_int(static_cast<int32_t>(0xffff0000)));
    return {_mm256_castsi256_ps(kept.first), _mm256_castsi256_ps(kept.second)};
}
// The same as above with a pair of `x` for each lane.
inline Floats dot_pairs(Floats sum, Bytes weights, Bytes x) {
    sum = multiply_add(lower_bfloat16(weights), lower_bfloat16(x), sum);
    return multiply_add(upper_bfloat16(weights), upper_bfloat16(x), sum);
}

// Rounds to the nearest, halves to even; NaN stays NaN.
inline void store_bfloat16(uint16_t* to, Floats a, int count) {
    float values[16];
    store_floats(values, a, 16);
    for (int i = 0; i < count; ++i) to[i] = round_bfloat16(values[i]);
}

// What storing as bfloat16 and loading again would give.
inline Floats round_to_bfloat16(Floats a) {
    uint16_t rounded[16];
    store_bfloat16(rounded, a, 16);
    return load_bfloat16(rounded);
}

inline Floats subtract(Floats a, Floats b) {
    return {_mm256_sub_ps(a.first, b.first), _mm256_sub_ps(a.second, b.second)};
}
inline Floats divide(Floats a, Floats b) {
    return {_mm256_div_ps(a.first, b.first), _mm256_div_ps(a.second, b.second)};
}
// `b` where one of them is NaN.
inline Floats larger(Floats a, Floats b) {
    return {_mm256_max_ps(a.first, b.first), _mm256_max_ps(a.second, b.second)};
}
// Whether a lane of `a` is above that of `b`; NaN is not.
inline bool any_above(Floats a, Floats b) {
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(a.first, b.first, _CMP_GT_OQ),
                                           _mm256_cmp_ps(a.second, b.second, _CMP_GT_OQ))) != 0;
}

// Lanes from `from` up to but without `to` as they are, the others `otherwise`.
inline Floats keep_lanes(Floats a, int from, int to, float otherwise) {
    const auto keep = [&](__m256 half, int first) {
        const __m256i lanes = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                               _mm256_set1_epi32(first));
        const __m256i inside = _mm256_andnot_si256(
            _mm256_cmpgt_epi32(_mm256_set1_epi32(from), lanes),
            _mm256_cmpgt_epi32(_mm256_set1_epi32(to), lanes));
        return _mm256_blendv_ps(_mm256_set1_ps(otherwise), half, _mm256_castsi256_ps(inside));
    };
    return {keep(a.first, 0), keep(a.second, 8)};
}

// The bits of |a|, in the order of the numbers; those of NaN are above all others.
inline Ints magnitude_bits(Floats a) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    return {_mm256_and_si256(_mm256_castps_si256(a.first), mask),
            _mm256_and_si256(_mm256_castps_si256(a.second), mask)};
}
inline Ints larger_int(Ints a, Ints b) {
    return {_mm256_max_epi32(a.first, b.first), _mm256_max_epi32(a.second, b.second)};
}
inline int32_t largest_int(Ints a) {
    const __m256i eight = _mm256_max_epi32(a.first, a.second);
    const __m128i upper = _mm256_extracti128_si256(eight, 1);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), upper);
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtsi128_si32(four);
}

// To the nearest integers, halves to even; they must fit. NaN becomes 0.
inline void store_as_int8(int8_t* to, Floats a) {
    int32_t values[16];
    store_bytes(values, {_mm256_cvtps_epi32(a.first), _mm256_cvtps_epi32(a.second)});
    for (int i = 0; i < 16; ++i) to[i] = static_cast<int8_t>(values[i]);
}
inline void store_as_int16(uint16_t* to, Floats a) {
    int32_t values[16];
    store_bytes(values, {_mm256_cvtps_epi32(a.first), _mm256_cvtps_epi32(a.second)});
    for (int i = 0; i < 16; ++i) to[i] = static_cast<uint16_t>(values[i]);
}

// 32 numbers of 8 bits as 16 pairs of 16 bits.
inline Bytes load_int8_pairs(const int8_t* from) {
    const auto load = [](const int8_t* half) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half)));
    };
    return {load(from), load(from + 16)};
}
// Adds the products of pairs of 16-bit numbers with the pair in `x`.
inline Ints dot_int16_pairs(Ints sum, Bytes pairs, int32_t x) {
    const __m256i both_of_x = _mm256_set1_epi32(x);
    return {_mm256_add_epi32(sum.first, _mm256_madd_epi16(pairs.first, both_of_x)),
            _mm256_add_epi32(sum.second, _mm256_madd_epi16(pairs.second, both_of_x))};
}

inline Floats add(Floats a, Floats b) {
    return {_mm256_add_ps(a.first, b.first), _mm256_add_ps(a.second, b.second)};
}
inline Floats copy_sign(Floats magnitude, Floats sign) {
    const __m256 mask = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(magnitude.first, _mm256_and_ps(sign.first, mask)),
            _mm256_or_ps(magnitude.second, _mm256_and_ps(sign.second, mask))};
}
inline float first_lane(Floats a) { return _mm256_cvtss_f32(a.first); }
inline float largest_lane(Floats a) {
    const __m256 eight = _mm256_max_ps(a.first, a.second);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline float sum_lanes(Floats a) {
    const __m256 eight = _mm256_add_ps(a.first, a.second);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline Floats round_to_integers(Floats a) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.first, kNearest), _mm256_round_ps(a.second, kNearest)};
}
// a * 2**power; 0 where the result would be below the smallest normal number.
inline Floats scale_by_power(Floats a, Floats power) {
    const auto scale = [](__m256 half, __m256 by) {
        const __m256 lowest = _mm256_set1_ps(-127);
        const __m256i bits = _mm256_cvtps_epi32(_mm256_max_ps(by, lowest));
        const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(half, _mm256_castsi256_ps(exponent));
    };
    return {scale(a.first, power.first), scale(a.second, power.second)};
}

// 16 numbers of two rows of bfloat16, side by side: (first[i], second[i]) in lane i.
inline Bytes interleave(const uint16_t* first, const uint16_t* second) {
    const auto join = [](const uint16_t* low, const uint16_t* high) {
        const __m128i lows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
        const __m128i highs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high));
        return _mm256_or_si256(_mm256_cvtepu16_epi32(lows),
                               _mm256_slli_epi32(_mm256_cvtepu16_epi32(highs), 16));
    };
    return {join(first, second), join(first + 8, second + 8)};
}

// Word j of row i becomes word i of row j; rows of the result are `stride` words apart.
inline void transpose_words(const uint32_t* const* rows, uint32_t* to, int stride) {
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 16; ++j) to[j * stride + i] = rows[i][j];
    }
}

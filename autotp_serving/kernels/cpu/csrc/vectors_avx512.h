// 512-bit vectors by AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later).
//
// One vector is 16 rows of a weight, each with four bytes or one number. vectors_avx2.h has the
// same names.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "prefetch.h"

using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;

// Tokens whose sums fit in the 32 registers beside the weights.
constexpr int kMaxTokens = 8;

inline int32_t load_int32(const void* from) {
    int32_t value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

inline Bytes load_bytes(const void* from) { return _mm512_loadu_si512(from); }
inline void store_bytes(void* to, Bytes a) { _mm512_storeu_si512(to, a); }
inline Bytes same_bytes(uint8_t value) { return _mm512_set1_epi8(static_cast<char>(value)); }
inline Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
inline Bytes flip(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
inline Bytes subtract(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
template <int kBits>
Bytes shift_right(Bytes a) {
    return kBits ? _mm512_srli_epi32(a, kBits) : a;
}
template <int kBits>
Bytes shift_left(Bytes a) {
    return kBits ? _mm512_slli_epi32(a, kBits) : a;
}

// Byte j of each row becomes `value` where bit j of the row's number is set, else 0.
inline Bytes spread_bits(Ints bits, Bytes value) {
    const Bytes lowest = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    const Bytes lanes = _mm512_shuffle_epi8(bits, lowest);
    return _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(lanes, _mm512_set1_epi32(0x08040201)),
                                 value);
}

// Entry `index` (below 16) of a table of 16 bytes, for each byte.
inline Bytes load_table(const uint8_t* table) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
inline Bytes look_up(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }

inline Ints same_int(int32_t value) { return _mm512_set1_epi32(value); }
inline Ints sixteenth(Ints a) { return _mm512_srai_epi32(a, 4); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }

// Adds to each row the product of its four unsigned bytes with the same four signed ones. VNNI
// has room for any byte; `kWide` matters to AVX2 alone.
template <bool kWide>
Ints dot_bytes(Ints sum, Bytes weights, int32_t x) {
    return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(x));
}
constexpr bool kAnyByteFits = true;

inline Floats same_float(float value) { return _mm512_set1_ps(value); }
inline Floats as_floats(Bytes bits) { return _mm512_castsi512_ps(bits); }
inline Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load_halves(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// Every other of 32 halves: those at the lower or the upper places of their pairs.
inline Floats lower_halves(Bytes pairs) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
}
inline Floats upper_halves(Bytes pairs) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
}
inline void store_halves(uint16_t* to, Floats a, int count) {
    const __m256i halves = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (count == 16) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), halves);
}
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

// A store under a mask is slow on some processors: a whole vector goes without one.
inline void store_floats(float* to, Floats a, int count) {
    if (count == 16) return _mm512_storeu_ps(to, a);
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), a);
}

// A table of 128 bfloat16 numbers, their upper and their lower bytes apart.
struct PairTable {
    Bytes upper[2], lower[2];
};
inline PairTable load_pair_table(const uint8_t* upper, const uint8_t* lower) {
    return {{load_bytes(upper), load_bytes(upper + 64)}, {load_bytes(lower), load_bytes(lower + 64)}};
}

// Four codes per row become two pairs of bfloat16: of codes 0 and 2, and of codes 1 and 3. Bit 7
// of a code is the sign.
struct Pairs {
    Bytes even, odd;
};
inline Pairs look_up_pairs(const PairTable& table, Bytes codes) {
    const Bytes sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const Bytes magnitude = _mm512_permutex2var_epi8(table.upper[0], codes, table.upper[1]);
    const Bytes upper = _mm512_ternarylogic_epi32(magnitude, codes, sign, 0xf8);  // a | (b & c)
    const Bytes lower = _mm512_permutex2var_epi8(table.lower[0], codes, table.lower[1]);
    const Bytes low_halves = _mm512_set1_epi16(0x00ff);
    constexpr int kSelect = 0xca;  // bits of the second where the first is set, else of the third
    return {_mm512_ternarylogic_epi32(low_halves, lower, _mm512_slli_epi16(upper, 8), kSelect),
            _mm512_ternarylogic_epi32(low_halves, _mm512_srli_epi16(lower, 8), upper, kSelect)};
}

inline Floats dot_pairs(Floats sum, Bytes weights, int32_t x) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights),
                            reinterpret_cast<__m512bh>(_mm512_set1_epi32(x)));
#else
    const int32_t first = x << 16, second = x & static_cast<int32_t>(0xffff0000);
    const Bytes upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)),
                          _mm512_castsi512_ps(_mm512_set1_epi32(first)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(weights, upper)),
                           _mm512_castsi512_ps(_mm512_set1_epi32(second)), sum);
#endif
}

// Of 16 pairs of bfloat16, those at the lower or the upper places.
inline Floats lower_bfloat16(Bytes pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
}
inline Floats upper_bfloat16(Bytes pairs) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000))));
}
// The same as above with a pair of `x` for each lane.
inline Floats dot_pairs(Floats sum, Bytes weights, Bytes x) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights),
                            reinterpret_cast<__m512bh>(x));
#else
    sum = _mm512_fmadd_ps(lower_bfloat16(weights), lower_bfloat16(x), sum);
    return _mm512_fmadd_ps(upper_bfloat16(weights), upper_bfloat16(x), sum);
#endif
}

// To the nearest bfloat16, halves to even; NaN stays NaN. Numbers below the smallest normal may
// become 0.
inline __m256i to_bfloat16(Floats a) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a));
#else
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
}
inline Floats from_bfloat16(__m256i numbers) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}
inline void store_bfloat16(uint16_t* to, Floats a, int count) {
    const __m256i halves = to_bfloat16(a);
    if (count == 16) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), halves);
}
inline Floats load_bfloat16(const uint16_t* from) {
    return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// What storing as bfloat16 and loading again would give.
inline Floats round_to_bfloat16(Floats a) { return from_bfloat16(to_bfloat16(a)); }

inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
// `b` where one of them is NaN.
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
// Whether a lane of `a` is above that of `b`; NaN is not.
inline bool any_above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

// Lanes from `from` up to but without `to` as they are, the others `otherwise`.
inline Floats keep_lanes(Floats a, int from, int to, float otherwise) {
    const auto below = [](int lane) {
        return lane <= 0 ? 0u : lane >= 16 ? 0xffffu : (1u << lane) - 1;
    };
    return _mm512_mask_blend_ps(static_cast<__mmask16>(below(to) & ~below(from)),
                                _mm512_set1_ps(otherwise), a);
}

// The bits of |a|, in the order of the numbers; those of NaN are above all others.
inline Ints magnitude_bits(Floats a) {
    return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
}
inline Ints larger_int(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline int32_t largest_int(Ints a) { return _mm512_reduce_max_epi32(a); }

// To the nearest integers, halves to even; they must fit. NaN becomes 0.
inline void store_as_int8(int8_t* to, Floats a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}
inline void store_as_int16(uint16_t* to, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a)));
}

// 32 numbers of 8 bits as 16 pairs of 16 bits.
inline Bytes load_int8_pairs(const int8_t* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
// Adds the products of pairs of 16-bit numbers with the pair in `x`.
inline Ints dot_int16_pairs(Ints sum, Bytes pairs, int32_t x) {
    return _mm512_dpwssd_epi32(sum, pairs, _mm512_set1_epi32(x));
}

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats copy_sign(Floats magnitude, Floats sign) {
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
inline float first_lane(Floats a) { return _mm512_cvtss_f32(a); }
inline float largest_lane(Floats a) { return _mm512_reduce_max_ps(a); }
inline float sum_lanes(Floats a) { return _mm512_reduce_add_ps(a); }

inline Floats round_to_integers(Floats a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2**power.
inline Floats scale_by_power(Floats a, Floats power) { return _mm512_scalef_ps(a, power); }

// 16 numbers of two rows of bfloat16, side by side: (first[i], second[i]) in lane i.
inline Bytes interleave(const uint16_t* first, const uint16_t* second) {
    const __m256i lows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
    const __m256i highs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
    return _mm512_or_si512(_mm512_cvtepu16_epi32(lows),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(highs), 16));
}

// Word j of row i becomes word i of row j; rows of the result are `stride` words apart.
inline void transpose_words(const uint32_t* const* rows, uint32_t* to, int stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i]);
    // Words of pairs of rows, then of fours, within lanes of four words; then the lanes.
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    }
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * stride, a[i]);
}

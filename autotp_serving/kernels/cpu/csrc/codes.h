// How a format's bytes become the vectors that are multiplied.
//
// A tile is 16 rows by 64 columns. Its planes are cut into 4-byte words, and word w of all 16 rows
// makes vector w; so four columns of 16 rows are a vector of their own, the operand of VNNI and of
// AMX. What a word holds follows packing.py: a 4-bit word has four codes in its low nibbles and
// those of 32 columns further in its high ones, and so on.
#pragma once

#include <cstdint>

#include ISA_VECTORS

#include "activations.h"

constexpr int kRows = 16;
constexpr int kWords = kBlock / 4;  // vectors of codes per tile

enum class Kind { kCodes, kTable, kPairs };
enum class Scale { kHalf, kFloat, kNone };

// kLow and kHigh: bits of a code in the planes `codes` and `high`.
template <int kLowBits, int kHighBits, Kind kKindOf, Scale kScaleOf, bool kHasMins>
struct Format {
    static constexpr int kLow = kLowBits, kHigh = kHighBits;
    static constexpr Kind kKind = kKindOf;
    static constexpr Scale kScale = kScaleOf;
    static constexpr bool kMins = kHasMins;
    // Codes above 128 overflow AVX2's 16-bit products.
    static constexpr bool kWide = kKind != Kind::kCodes || kLow == 8;
    static constexpr int kLowBytes = kRows * kBlock * kLow / 8;
    static constexpr int kHighBytes = kRows * kBlock * kHigh / 8;
};

// The planes of 16 rows, tile after tile; `decoded` (see multiply.h) where there are many tokens.
struct Group {
    const uint8_t* codes;
    const uint8_t* high;
    const uint8_t* scales;
    const uint16_t* mins;
    const uint8_t* decoded;
};

// Vector `kWord` of a tile's codes: columns 4 * kWord to 4 * kWord + 3 of 16 rows, a byte each.
template <class F, int kWord>
inline Bytes load_codes(const uint8_t* low, const uint8_t* high, Bytes table) {
    constexpr int kPerPlane = kWords * F::kLow / 8;  // vectors that the low bits lie in
    constexpr int kShift = kWord / kPerPlane * F::kLow;
    Bytes codes = load_bytes(low + kWord % kPerPlane * 64);
    if constexpr (F::kLow < 8) {
        codes = both(shift_right<kShift>(codes), same_bytes((1 << F::kLow) - 1));
    }
    if constexpr (F::kHigh == 1) {
        const Ints bits = load_bytes(high + kWord / 8 * 64);
        codes = either(codes, spread_bits(shift_right<kWord % 8 * 4>(bits),
                                          same_bytes(1 << F::kLow)));
    } else if constexpr (F::kHigh == 2) {
        const Bytes bits = shift_right<kWord / 4 * 2>(load_bytes(high + kWord % 4 * 64));
        codes = either(codes, shift_left<F::kLow>(both(bits, same_bytes(3))));
    }
    if constexpr (F::kKind == Kind::kTable) codes = look_up(table, codes);
    // Signed bytes become unsigned, 128 too large.
    if constexpr (F::kKind == Kind::kCodes && F::kLow == 8) codes = flip(codes, same_bytes(0x80));
    return codes;
}

template <class F>
inline Floats load_scales(const Group& group, int64_t tile) {
    if constexpr (F::kScale == Scale::kHalf) {
        return load_halves(reinterpret_cast<const uint16_t*>(group.scales) + tile * kRows);
    } else {
        return load_floats(reinterpret_cast<const float*>(group.scales) + tile * kRows);
    }
}

// A weight's tiles, from bytes to what the tensor cores take. See tiles.py for their order.
//
// Of the format, the compiler is told: LOW_BITS, HIGH_BITS, KIND (0 integers, 1 table, 2 small
// floats, 3 none: the weight is bfloat16 in plain rows), SCALE_BYTES (0, 2, 4), MINS, and for small
// floats MANTISSA_BITS.
#pragma once

constexpr int kLowBits = LOW_BITS;
constexpr int kHighBits = HIGH_BITS;
constexpr int kKind = KIND;
constexpr int kScaleBytes = SCALE_BYTES;
constexpr bool kMins = MINS;
constexpr int kMantissaBits = MANTISSA_BITS;
constexpr bool kIntegers = kKind <= 1;

// Without a high part and table, nibbles are multiplied where they stand in their byte, sixteen
// times too large; symmetric ones with their sign.
constexpr bool kNibbles = kKind == 0 && kLowBits == 4 && kHighBits == 0;
constexpr bool kUnsignedCodes = kKind == 0 && kMins;
constexpr float kCodeUnit = kNibbles ? 0.0625f : 1.0f;

struct Weight {
    const uint8_t* codes;
    const uint8_t* high;
    const uint8_t* scales;
    const uint8_t* mins;
    int64_t blocks;  // of 64 columns
};

// What a lane reads of one tile: of row g and of row g + 8, in this order.
struct Tile {
    uint32_t low[kKind == 3 ? 16 : kLowBits];
    uint32_t high[kHighBits == 2 ? 2 : 1];
    float scale[2];
    float min[2];
};

struct Table {
    uint32_t words[4];
};

// What a tile takes in memory.
constexpr int kCodesBytes = kRows * kBlock * kLowBits / 8;
constexpr int kHighBytes = kRows * kBlock * kHighBits / 8;
constexpr int kScalesBytes = kRows * kScaleBytes;
constexpr int kMinsBytes = kMins ? kRows * 2 : 0;

template <bool kOnce>
__device__ __forceinline__ uint4 read16(const uint8_t* from) {
    if constexpr (kOnce) return load_once(from);
    return *reinterpret_cast<const uint4*>(from);
}
template <bool kOnce>
__device__ __forceinline__ uint2 read8(const uint8_t* from) {
    if constexpr (kOnce) return load_once8(from);
    return *reinterpret_cast<const uint2*>(from);
}
template <bool kOnce>
__device__ __forceinline__ uint32_t read4(const uint8_t* from) {
    if constexpr (kOnce) return load_once4(from);
    return *reinterpret_cast<const uint32_t*>(from);
}

// A lane's part of a tile of a low-bit weight, from memory that is read once or from shared memory.
template <bool kOnce>
__device__ __forceinline__ void read_tile(const uint8_t* codes, const uint8_t* high,
                                          const uint8_t* scales, const uint8_t* mins, int lane,
                                          Tile& tile) {
    if constexpr (kLowBits == 2) {
        const uint2 v = read8<kOnce>(codes + lane * 8);
        tile.low[0] = v.x, tile.low[1] = v.y;
    } else {
#pragma unroll
        for (int part = 0; part < kLowBits / 4; ++part) {
            const uint4 v = read16<kOnce>(codes + part * 512 + lane * 16);
            uint32_t* to = tile.low + part * 4;
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
    }
    if constexpr (kHighBits == 1) {
        tile.high[0] = read4<kOnce>(high + lane * 4);
    } else if constexpr (kHighBits == 2) {
        const uint2 v = read8<kOnce>(high + lane * 8);
        tile.high[0] = v.x, tile.high[1] = v.y;
    }
    const int pair = lane / 4;
    if constexpr (kScaleBytes == 2) {
        const uint32_t v = read4<kOnce>(scales + pair * 4);
        tile.scale[0] = half_to_float(v & 0xffff), tile.scale[1] = half_to_float(v >> 16);
    } else if constexpr (kScaleBytes == 4) {
        const uint2 v = read8<kOnce>(scales + pair * 8);
        tile.scale[0] = __uint_as_float(v.x), tile.scale[1] = __uint_as_float(v.y);
    } else {
        tile.scale[0] = tile.scale[1] = 1.0f;
    }
    if constexpr (kMins) {
        const uint32_t v = read4<kOnce>(mins + pair * 4);
        tile.min[0] = half_to_float(v & 0xffff), tile.min[1] = half_to_float(v >> 16);
    }
}

__device__ __forceinline__ void load_tile(const Weight& w, int64_t row_tile, int64_t block,
                                          int lane, Tile& tile) {
    if constexpr (kKind == 3) {
        // [h][row half] of 16 bytes each, from rows that lie plainly one after another.
        const int64_t columns = w.blocks * kBlock;
        const uint8_t* row =
            w.codes + ((row_tile * kRows + lane / 4) * columns + block * kBlock + lane % 4 * 8) * 2;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 v = load_once(row + half * 16 * columns + h * 64);
                uint32_t* to = tile.low + h * 8 + half * 4;
                to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
            }
        }
        return;
    }
    const int64_t index = row_tile * w.blocks + block;
    read_tile<true>(w.codes + index * kCodesBytes, w.high + index * kHighBytes,
                    w.scales + index * kScalesBytes, w.mins + index * kMinsBytes, lane, tile);
}

// Four codes of a row half, a byte each; `group` is h * 2 + q of column h * 32 + t * 8 + q * 4.
__device__ __forceinline__ uint32_t take_codes(const Tile& tile, int half, int group) {
    uint32_t codes;
    if constexpr (kLowBits == 8) {
        codes = tile.low[(group >> 1) * 4 + half * 2 + (group & 1)];
    } else if constexpr (kLowBits == 4) {
        const uint32_t word = tile.low[half * 2 + (group & 1)];
        codes = (group >> 1 ? word >> 4 : word) & 0x0f0f0f0fu;
    } else {
        codes = (tile.low[half] >> (2 * group)) & 0x03030303u;
    }
    if constexpr (kHighBits == 1) {
        codes |= ((tile.high[0] >> (half * 4 + group)) & 0x01010101u) << kLowBits;
    } else if constexpr (kHighBits == 2) {
        codes |= ((tile.high[half] >> (2 * group)) & 0x03030303u) << kLowBits;
    }
    return codes;
}

// Four signed bytes of a table of 16, by codes in bytes.
__device__ __forceinline__ uint32_t look_up(const Table& table, uint32_t codes) {
    const uint32_t low = codes & 0x07070707u;
    const uint32_t near = low | low >> 4;
    const uint32_t choice = (near & 0xffu) | ((near >> 8) & 0xff00u);
    const uint32_t first = __byte_perm(table.words[0], table.words[1], choice);
    const uint32_t second = __byte_perm(table.words[2], table.words[3], choice);
    // Bytes of ones where a code is 8 or more: the sign bit, spread over its byte.
    uint32_t upper;
    asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(upper) : "r"(codes << 4));
    return (first & ~upper) | (second & upper);
}

// Four codes as the bytes that are multiplied.
__device__ __forceinline__ uint32_t take_bytes(const Tile& tile, int half, int group,
                                               const Table& table) {
    if constexpr (kNibbles) {
        const uint32_t word = tile.low[half * 2 + (group & 1)];
        const uint32_t nibbles = (group >> 1 ? word : word << 4) & 0xf0f0f0f0u;
        return kMins ? nibbles : nibbles ^ 0x80808080u;
    }
    const uint32_t codes = take_codes(tile, half, group);
    if constexpr (kKind == 1) return look_up(table, codes);
    if constexpr (kKind == 0 && !kMins && kLowBits + kHighBits < 8) {
        // Less an offset of half the range: no byte borrows from the next.
        constexpr uint32_t kHalf = 0x01010101u << (kLowBits + kHighBits - 1);
        return ((codes | 0x80808080u) - kHalf) ^ 0x80808080u;
    }
    return codes;
}

// Four codes as two pairs of bfloat16.
__device__ __forceinline__ void take_floats(const Tile& tile, int half, int group,
                                            uint32_t (&pairs)[2]) {
    if constexpr (kKind == 3) {
        const int h = group >> 1, q = group & 1;
        pairs[0] = tile.low[h * 8 + half * 4 + q * 2];
        pairs[1] = tile.low[h * 8 + half * 4 + q * 2 + 1];
        return;
    }
    constexpr int kBits = kLowBits + kHighBits;
    constexpr uint32_t kSign = (1u << (kBits - 1)) * 0x10001u;
    constexpr uint32_t kMagnitude = ((1u << (kBits - 1)) - 1) * 0x10001u;
    const uint32_t codes = take_codes(tile, half, group);
    const uint32_t spread[2] = {__byte_perm(codes, 0, 0x4140), __byte_perm(codes, 0, 0x4342)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        // The exponent is float16's, 112 lower than bfloat16 counts: times 2**112, exactly.
        const uint32_t bits = (spread[i] & kMagnitude) << (7 - kMantissaBits) |
                              (spread[i] & kSign) << (16 - kBits);
        asm("fma.rn.bf16x2 %0, %1, %2, %3;"
            : "=r"(pairs[i])
            : "r"(bits), "r"(0x77807780u), "r"(0x80008000u));
    }
}

// A tile as the tensor cores take it: [h] of integers, or [group] of floats, and the rows' scales.
struct Operand {
    uint32_t words[kIntegers ? 2 : 4][4];
    float scale[2];
    float min[2];
};

__device__ __forceinline__ void prepare(const Tile& tile, const Table& table, float unit,
                                        Operand& to) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        to.scale[half] = tile.scale[half] * unit;
        if constexpr (kMins) to.min[half] = tile.min[half];
    }
    if constexpr (kIntegers) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                to.words[h][i] = take_bytes(tile, i & 1, h * 2 + (i >> 1), table);
            }
        }
    } else {
#pragma unroll
        for (int group = 0; group < 4; ++group) {
            uint32_t upper[2], lower[2];
            take_floats(tile, 0, group, upper);
            take_floats(tile, 1, group, lower);
            to.words[group][0] = upper[0], to.words[group][1] = lower[0];
            to.words[group][2] = upper[1], to.words[group][3] = lower[1];
        }
    }
}

// sums += a tile of small floats times a tile of tokens, of which `low` and `high` are two halves.
__device__ __forceinline__ void multiply_floats(const Operand& a, uint4 low, uint4 high,
                                                float (&sums)[4]) {
    float total[4] = {0, 0, 0, 0};
    float(&to)[4] = kScaleBytes ? total : sums;
    multiply_pairs(to, a.words[0], low.x, low.y);
    multiply_pairs(to, a.words[1], low.z, low.w);
    multiply_pairs(to, a.words[2], high.x, high.y);
    multiply_pairs(to, a.words[3], high.z, high.w);
    if constexpr (kScaleBytes != 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = fmaf(total[i], a.scale[i >> 1], sums[i]);
    }
}

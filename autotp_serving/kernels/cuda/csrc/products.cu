// Products of a weight with few tokens, 1 to 64: out[token, row] = sum over columns of x * weight.
//
// A warp takes tiles of 16 rows by 64 columns, which lie in memory as the tensor cores take them
// (see tiles.py): a lane reads 16 bytes, next to those of its neighbours. The warps of a thread
// block share the columns; their sums are added in a fixed order. So a token's result is bitwise
// the same whatever stands beside it, and however many rows of tiles a warp takes at once.
//
// Of the format, the compiler is told: LOW_BITS, HIGH_BITS, KIND (0 integers, 1 table, 2 small
// floats, 3 none: the weight is bfloat16 in plain rows), SCALE_BYTES (0, 2, 4), MINS, and for small
// floats MANTISSA_BITS. Of the shape: WARPS, TOKEN_TILES, ROW_TILES, DEPTH (tiles of a step).
#include "common.cuh"

constexpr int kLowBits = LOW_BITS;
constexpr int kHighBits = HIGH_BITS;
constexpr int kKind = KIND;
constexpr int kScaleBytes = SCALE_BYTES;
constexpr bool kMins = MINS;
constexpr int kMantissaBits = MANTISSA_BITS;
constexpr int kWarps = WARPS;
constexpr int kTokenTiles = TOKEN_TILES;
constexpr int kRowTiles = ROW_TILES;
constexpr int kDepth = DEPTH;
constexpr bool kIntegers = kKind <= 1;
// Thread blocks of a multiprocessor at a time: two of 512 threads have 64 registers each.
constexpr int kThreadBlocks = kWarps == 16 && kTokenTiles * kRowTiles == 1 && kKind != 3 ? 2 : 1;

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
    const uint8_t* codes = w.codes + index * (kRows * kBlock * kLowBits / 8);
    if constexpr (kLowBits == 2) {
        const uint2 v = load_once8(codes + lane * 8);
        tile.low[0] = v.x, tile.low[1] = v.y;
    } else {
#pragma unroll
        for (int part = 0; part < kLowBits / 4; ++part) {
            const uint4 v = load_once(codes + part * 512 + lane * 16);
            uint32_t* to = tile.low + part * 4;
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
    }
    if constexpr (kHighBits == 1) {
        tile.high[0] = load_once4(w.high + index * 128 + lane * 4);
    } else if constexpr (kHighBits == 2) {
        const uint2 v = load_once8(w.high + index * 256 + lane * 8);
        tile.high[0] = v.x, tile.high[1] = v.y;
    }
    const int pair = static_cast<int>(lane / 4);
    if constexpr (kScaleBytes == 2) {
        const uint32_t v = load_once4(w.scales + (index * 8 + pair) * 4);
        tile.scale[0] = half_to_float(v & 0xffff), tile.scale[1] = half_to_float(v >> 16);
    } else if constexpr (kScaleBytes == 4) {
        const uint2 v = load_once8(w.scales + (index * 8 + pair) * 8);
        tile.scale[0] = __uint_as_float(v.x), tile.scale[1] = __uint_as_float(v.y);
    } else {
        tile.scale[0] = tile.scale[1] = 1.0f;
    }
    if constexpr (kMins) {
        const uint32_t v = load_once4(w.mins + (index * 8 + pair) * 4);
        tile.min[0] = half_to_float(v & 0xffff), tile.min[1] = half_to_float(v >> 16);
    }
}

// The tiles of a warp's next step: DEPTH blocks of columns, WARPS apart.
__device__ __forceinline__ void load_tiles(const Weight& w, int64_t first_row_tile,
                                           int64_t last_row_tile, int64_t block, int lane,
                                           Tile (&tiles)[kDepth][kRowTiles]) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
            // A repeated read at the end costs less than a branch in the middle.
            load_tile(w, min(first_row_tile + r, last_row_tile),
                      min(block + d * kWarps, w.blocks - 1), lane, tiles[d][r]);
        }
    }
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

// Activations: integers as `quantize_tokens` writes them, or bfloat16 in plain rows.
struct Activations {
    const uint8_t* values;
    const float* scales;
    const float* sums;
    int tokens;
};

struct Fragments {
    uint4 words[kIntegers ? 1 : 2];
    float2 scale;
    float2 sum;
};

__device__ __forceinline__ void load_fragments(const Activations& x, int64_t blocks, int64_t block,
                                               int token_tile, int lane, Fragments& to) {
    const int token = token_tile * kTokens + lane / 4;
    if constexpr (kIntegers) {
        const int64_t index = token_tile * blocks + block;
        to.words[0] = make_uint4(0, 0, 0, 0);
        if (token < x.tokens) {
            to.words[0] =
                *reinterpret_cast<const uint4*>(x.values + index * (kTokens * kBlock) + lane * 16);
        }
        to.scale = to.sum = make_float2(0, 0);
        if (token_tile * kTokens < x.tokens) {
            to.scale = *reinterpret_cast<const float2*>(x.scales + index * kTokens + lane % 4 * 2);
            if constexpr (kMins) {
                to.sum = *reinterpret_cast<const float2*>(x.sums + index * kTokens + lane % 4 * 2);
            }
        }
    } else {
        to.words[0] = to.words[1] = make_uint4(0, 0, 0, 0);
        if (token < x.tokens) {
            const uint8_t* from =
                x.values + ((token * blocks + block) * kBlock + lane % 4 * 8) * 2;
            to.words[0] = *reinterpret_cast<const uint4*>(from);
            to.words[1] = *reinterpret_cast<const uint4*>(from + 64);
        }
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

// sums += a tile of weights times a tile of tokens, in one block of columns.
__device__ __forceinline__ void multiply_tiles(const Operand& a, const Fragments& x,
                                               float (&sums)[4]) {
    if constexpr (kIntegers) {
        // As float32 these bits are 1.5 * 2**23, and adding an integer to them adds it to that: a
        // subtraction then is the conversion.
        constexpr int32_t kRounder = 0x4b400000;
        int32_t total[4] = {kRounder, kRounder, kRounder, kRounder};
        const uint4 w = x.words[0];
        multiply_bytes<kUnsignedCodes>(total, a.words[0], w.x, w.y);
        multiply_bytes<kUnsignedCodes>(total, a.words[1], w.z, w.w);
        const float scale[2] = {x.scale.x, x.scale.y};
        const float sum[2] = {x.sum.x, x.sum.y};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float value = __int_as_float(total[i]) - 12582912.0f;
            sums[i] = fmaf(value, a.scale[i >> 1] * scale[i & 1], sums[i]);
            if constexpr (kMins) sums[i] = fmaf(a.min[i >> 1], sum[i & 1], sums[i]);
        }
    } else {
        float total[4] = {0, 0, 0, 0};
        float(&to)[4] = kScaleBytes ? total : sums;
        const uint4 low = x.words[0], high = x.words[1];
        multiply_pairs(to, a.words[0], low.x, low.y);
        multiply_pairs(to, a.words[1], low.z, low.w);
        multiply_pairs(to, a.words[2], high.x, high.y);
        multiply_pairs(to, a.words[3], high.z, high.w);
        if constexpr (kScaleBytes != 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i] = fmaf(total[i], a.scale[i >> 1], sums[i]);
        }
    }
}

// Grid: row tiles / ROW_TILES, rounded up. `out` is bfloat16 [tokens, rows]; rows in a last tile
// beyond `rows` are not written. `unit` is what a step of a table stands for.
extern "C" __global__ void __launch_bounds__(kWarps * kLanes, kThreadBlocks)
multiply_few(const uint8_t* codes, const uint8_t* high, const uint8_t* scales,
             const uint8_t* mins, const uint8_t* values, const float* x_scales, const float* x_sums,
             uint16_t* out, int64_t blocks, int rows, int tokens, float unit, uint4 table_words) {
    const Weight w{codes, high, scales, mins, blocks};
    const Activations x{values, x_scales, x_sums, tokens};
    const Table table{{table_words.x, table_words.y, table_words.z, table_words.w}};
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int64_t last_tile = (rows + kRows - 1) / kRows - 1;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kRowTiles;
    float sums[kRowTiles][kTokenTiles][4] = {};
    let_next_begin();
    // Two steps of reading are under way while one is multiplied; the first two begin before the
    // activations are there.
    constexpr int64_t kStep = kWarps * kDepth;
    Tile now[kDepth][kRowTiles], next[kDepth][kRowTiles];
    load_tiles(w, first, last_tile, warp, lane, now);
    if (warp + kStep < blocks) load_tiles(w, first, last_tile, warp + kStep, lane, next);
    wait_for_inputs();
    for (int64_t start = warp; start < blocks; start += kStep) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
            const int64_t block = start + d * kWarps;
            if (block < blocks) {
                Operand operands[kRowTiles];
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r) {
                    prepare(now[d][r], table, unit * kCodeUnit, operands[r]);
                    now[d][r] = next[d][r];
                }
#pragma unroll
                for (int n = 0; n < kTokenTiles; ++n) {
                    Fragments fragments;
                    load_fragments(x, blocks, block, n, lane, fragments);
#pragma unroll
                    for (int r = 0; r < kRowTiles; ++r) {
                        multiply_tiles(operands[r], fragments, sums[r][n]);
                    }
                }
            }
        }
        const int64_t ahead = start + 2 * kStep;
        if (ahead < blocks) load_tiles(w, first, last_tile, ahead, lane, next);
    }
    // [warp][token][row], 8 tokens at a time: a thread then adds up one row of one token.
    constexpr int kWidth = kRowTiles * kRows;
    __shared__ float parts[kWarps][kTokens][kWidth + 1];
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
        if (n * kTokens >= tokens) break;
        if (n) __syncthreads();
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = r * kRows + lane / 4 + (i >> 1) * 8;
                parts[warp][lane % 4 * 2 + (i & 1)][column] = sums[r][n][i];
            }
        }
        __syncthreads();
        const int left = min(kTokens, tokens - n * kTokens);
        for (int i = threadIdx.x; i < left * kWidth; i += kWarps * kLanes) {
            const int token = i / kWidth, column = i % kWidth;
            const int64_t row = first * kRows + column;
            float sum = 0;
#pragma unroll
            for (int k = 0; k < kWarps; ++k) sum += parts[k][token][column];
            if (row < rows) {
                out[static_cast<int64_t>(n * kTokens + token) * rows + row] =
                    float_to_bfloat16(sum);
            }
        }
    }
}

// Grid: (row tiles, blocks / WARPS rounded up). Row tiles from `first_tile` on, as bfloat16
// [16 * row tiles, columns]; each number is computed in float32 and rounded once.
extern "C" __global__ void __launch_bounds__(kWarps * kLanes)
dequantize_tiles(const uint8_t* codes, const uint8_t* high, const uint8_t* scales,
                 const uint8_t* mins, uint16_t* out, int64_t blocks, int first_tile,
                 const float* levels) {
    const Weight w{codes, high, scales, mins, blocks};
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int64_t block = static_cast<int64_t>(blockIdx.y) * kWarps + warp;
    if (block >= blocks) return;
    if constexpr (kKind == 3) return;
    Tile tile;
    load_tile(w, first_tile + blockIdx.x, block, lane, tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + half * 8 + lane / 4;
        uint16_t* to = out + (row * blocks + block) * kBlock + lane % 4 * 8;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float numbers[8];
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                const uint32_t four = take_codes(tile, half, h * 2 + q);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t code = (four >> (8 * i)) & 0xff;
                    float level;
                    if constexpr (kKind == 0 && kMins) {
                        level = static_cast<float>(static_cast<int32_t>(code));
                    } else if constexpr (kKind == 0 && kLowBits == 8) {
                        level = static_cast<float>(static_cast<int8_t>(code));
                    } else if constexpr (kKind == 0) {
                        level = static_cast<float>(static_cast<int32_t>(code) -
                                                   (1 << (kLowBits + kHighBits - 1)));
                    } else {
                        level = levels[code];
                    }
                    const float scaled = __fmul_rn(level, tile.scale[half]);
                    numbers[q * 4 + i] = kMins ? __fadd_rn(scaled, tile.min[half]) : scaled;
                }
            }
            *reinterpret_cast<uint4*>(to + h * 32) = pack_bfloat16(numbers);
        }
    }
}

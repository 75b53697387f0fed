// Products of a weight with few tokens, 1 to 64: out[token, row] = sum over columns of x * weight.
//
// A warp takes tiles of 16 rows by 64 columns, which lie in memory as the tensor cores take them
// (see tiles.py): a lane reads 16 bytes, next to those of its neighbours. The warps of a thread
// block share the columns; their sums are added in a fixed order. So a token's result is bitwise
// the same whatever stands beside it, and however many rows of tiles a warp takes at once.
//
// Of the shape, the compiler is told: WARPS, TOKEN_TILES, ROW_TILES, DEPTH (tiles of a step), and
// whether integer activations of one tile of tokens are STAGED in shared memory.
//
// GROUPED: the weight is that of many experts, one after another, and each thread block multiplies
// the tokens of one of them.
#include "common.cuh"
#include "weights.cuh"
#include "fragments.cuh"

constexpr int kWarps = WARPS;
constexpr int kTokenTiles = TOKEN_TILES;
constexpr int kRowTiles = ROW_TILES;
constexpr int kDepth = DEPTH;
constexpr bool kGrouped = GROUPED;
constexpr bool kStaged = STAGED;
static_assert(kIntegers || !kStaged, "integers alone are staged");
// Thread blocks of a multiprocessor at a time: two of 512 threads have 64 registers each.
constexpr int kThreadBlocks = kWarps == 16 && kTokenTiles * kRowTiles == 1 && kKind != 3 ? 2 : 1;

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

// Where a lane finds its token of a tile, and the two whose scales it needs; -1: there is none.
struct Places {
    int token;
    int scaled[2];
};

__device__ __forceinline__ void gather_fragments(const Activations& x, int64_t blocks,
                                                 int64_t block, const Places& at, int lane,
                                                 Fragments& to) {
    to.words[0] = make_uint4(0, 0, 0, 0);
    if constexpr (kIntegers) {
        const int64_t token = at.token;
        if (token >= 0) {
            const int64_t index = token / kTokens * blocks + block;
            to.words[0] = *reinterpret_cast<const uint4*>(
                x.values + (index * kTokens + token % kTokens) * kBlock + lane % 4 * 16);
        }
        float scales[2] = {0, 0}, sums[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (at.scaled[i] < 0) continue;
            const int64_t index = at.scaled[i] / kTokens * blocks + block;
            const int64_t place = index * kTokens + at.scaled[i] % kTokens;
            scales[i] = x.scales[place];
            if constexpr (kMins) sums[i] = x.sums[place];
        }
        to.scale = make_float2(scales[0], scales[1]);
        to.sum = make_float2(sums[0], sums[1]);
    } else {
        to.words[1] = make_uint4(0, 0, 0, 0);
        if (at.token >= 0) {
            const uint8_t* from =
                x.values + ((at.token * blocks + block) * kBlock + lane % 4 * 8) * 2;
            to.words[0] = *reinterpret_cast<const uint4*>(from);
            to.words[1] = *reinterpret_cast<const uint4*>(from + 64);
        }
    }
}

// Grid: row tiles / ROW_TILES, rounded up. `out` is bfloat16 [tokens, rows]; rows in a last tile
// beyond `rows` are not written. `unit` is what a step of a table stands for. Dynamic shared memory:
// what `stage` writes.
//
// GROUPED: `rows` are those of one expert. Grid y: groups of pairs of a token and an expert, each
// {expert, first of its `pairs`, how many}; the activations of a pair are those of token
// pair / `share`, its result is row `pair` of `out`.
extern "C" __global__ void __launch_bounds__(kWarps * kLanes, kThreadBlocks)
multiply_few(const uint8_t* codes, const uint8_t* high, const uint8_t* scales,
             const uint8_t* mins, const uint8_t* values, const float* x_scales, const float* x_sums,
             uint16_t* out, int64_t blocks, int rows, int tokens, float unit, uint4 table_words,
             const uint4* groups, const int* pairs, int share) {
    extern __shared__ uint4 memory[];
    const Weight w{codes, high, scales, mins, blocks};
    let_next_begin();
    const int64_t row_tiles = (rows + kRows - 1) / kRows;
    int64_t first_of_expert = 0;
    if constexpr (kGrouped) {
        wait_for_inputs();
        const uint4 group = groups[blockIdx.y];
        tokens = static_cast<int>(group.z);
        if (tokens == 0) return;
        pairs += group.y;
        first_of_expert = group.x * row_tiles;
    }
    const Activations x{values, x_scales, x_sums, tokens};
    const Table table{{table_words.x, table_words.y, table_words.z, table_words.w}};
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int64_t last_tile = first_of_expert + row_tiles - 1;
    const int64_t first = first_of_expert + static_cast<int64_t>(blockIdx.x) * kRowTiles;
    float sums[kRowTiles][kTokenTiles][4] = {};
    Places places[kGrouped ? kTokenTiles : 1];
    if constexpr (kGrouped) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
            const int at = n * kTokens + lane / 4, scaled = n * kTokens + lane % 4 * 2;
            places[n].token = at < tokens ? pairs[at] / share : -1;
            places[n].scaled[0] = scaled < tokens ? pairs[scaled] / share : -1;
            places[n].scaled[1] = scaled + 1 < tokens ? pairs[scaled + 1] / share : -1;
        }
    }
    // Two steps of reading are under way while one is multiplied; the first two begin before the
    // activations are there.
    constexpr int64_t kStep = kWarps * kDepth;
    Tile now[kDepth][kRowTiles], next[kDepth][kRowTiles];
    load_tiles(w, first, last_tile, warp, lane, now);
    if (warp + kStep < blocks) load_tiles(w, first, last_tile, warp + kStep, lane, next);
    if constexpr (!kGrouped) wait_for_inputs();
    Staged staged;
    if constexpr (kStaged) staged = stage(x, static_cast<int>(blocks), memory);
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
                    if constexpr (kGrouped) {
                        gather_fragments(x, blocks, block, places[n], lane, fragments);
                    } else if constexpr (kStaged) {
                        read_fragments(staged, static_cast<int>(block), lane, fragments);
                    } else {
                        load_fragments(x, blocks, block, n, lane, fragments);
                    }
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
            const int64_t row = (first - first_of_expert) * kRows + column;
            float sum = 0;
#pragma unroll
            for (int k = 0; k < kWarps; ++k) sum += parts[k][token][column];
            if (row < rows) {
                int64_t to = n * kTokens + token;
                if constexpr (kGrouped) to = pairs[to];
                out[to * rows + row] = float_to_bfloat16(sum);
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

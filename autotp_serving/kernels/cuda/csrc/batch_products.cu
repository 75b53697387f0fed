// Products of a low-bit weight with a batch of tokens: more than products.cu is quick for. Hopper.
//
// A thread block multiplies 128 rows of the weight, a tile of 16 rows a warp, by TOKEN_TILES tiles
// of 8 tokens. Both come through shared memory, so that activations are read once for all eight
// warps: STAGES blocks of 64 columns are there or under way, STEP of them multiplied between two
// meetings of the warps. THREAD_BLOCKS share a multiprocessor. SPLITS thread blocks, a cluster, share the
// columns; each adds up the sums of all for some of the tokens, in their order.
//
// GROUPED: see products.cu.
#include "common.cuh"
#include "weights.cuh"

constexpr int kTokenTiles = TOKEN_TILES;
constexpr int kSplits = SPLITS;
constexpr int kStages = STAGES;
constexpr int kStep = STEP;
constexpr bool kGrouped = GROUPED;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlockRows = kWarps * kRows;
constexpr int kBlockTokens = kTokenTiles * kTokens;

// A stage in shared memory: tiles of all warps, activations, what they are worth, their sums.
constexpr int kTileBytes = kCodesBytes + kHighBytes + kScalesBytes + kMinsBytes;
constexpr int kValueBytes = kIntegers ? kBlock : 2 * kBlock;  // of a token
constexpr int kValuesAt = kWarps * kTileBytes;
constexpr int kXScalesAt = kValuesAt + kBlockTokens * kValueBytes;
constexpr int kXSumsAt = kXScalesAt + (kIntegers ? kBlockTokens * 4 : 0);
constexpr int kStageBytes = kXSumsAt + (kMins ? kBlockTokens * 4 : 0);
constexpr int kPieces = (kBlockTokens * kValueBytes / 16 + kThreads - 1) / kThreads;
constexpr int kSumsStride = kBlockRows + 4;  // floats; no two lanes then share a bank

// A weight's scale times an integer is exact in fewer steps where the scale has a float16's digits.
constexpr bool kShortScale = kKind == 0 && kScaleBytes == 2;

__device__ __forceinline__ uint32_t shared_address(const void* at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Begins to copy to shared memory; zeros where not `is_there`.
__device__ __forceinline__ void copy16(void* to, const void* from, bool is_there = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(is_there ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy4(void* to, const void* from, bool is_there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(is_there ? 4 : 0)
                 : "memory");
}
__device__ __forceinline__ void end_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_for_stages() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// Four floats at the same place in another thread block's shared memory.
__device__ __forceinline__ float2 read_peer(const float* at, uint32_t peer) {
    uint32_t address;
    float2 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(shared_address(at)), "r"(peer));
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
                 : "=f"(v.x), "=f"(v.y)
                 : "r"(address)
                 : "memory");
    return v;
}

// What a thread copies of each block of columns, from where: of its warp's tile and of the whole
// thread block's activations. Computed once, moved on from stage to stage.
struct Sources {
    const uint8_t* codes;
    const uint8_t* high;
    const uint8_t* scales;
    const uint8_t* mins;
    const uint8_t* values[kPieces];
    uint32_t has_values;  // a bit each; without it zeros are copied
    const float* x_scale;
    const float* x_sum;
    bool has_scale;
};

template <int kBytes>
__device__ __forceinline__ void copy_part(uint8_t* to, const uint8_t*& from, int lane) {
#pragma unroll
    for (int i = 0; i < kBytes; i += 16 * kLanes) {
        if (i + 16 * kLanes <= kBytes || i + lane * 16 < kBytes) {
            copy16(to + i + lane * 16, from + i);
        }
    }
    from += kBytes;
}

__device__ __forceinline__ void find_tile(Sources& from, const Weight& w, int64_t row_tile,
                                          int64_t block, int lane) {
    const int64_t index = row_tile * w.blocks + block;
    from.codes = w.codes + index * kCodesBytes + lane * 16;
    from.high = w.high + index * kHighBytes + lane * 16;
    from.scales = w.scales + index * kScalesBytes + lane * 16;
    from.mins = w.mins + index * kMinsBytes + lane * 16;
}

__device__ __forceinline__ void copy_tile(uint8_t* stage, Sources& from, int warp, int lane) {
    uint8_t* to = stage + warp * kTileBytes;
    copy_part<kCodesBytes>(to, from.codes, lane);
    copy_part<kHighBytes>(to + kCodesBytes, from.high, lane);
    copy_part<kScalesBytes>(to + kCodesBytes + kHighBytes, from.scales, lane);
    copy_part<kMinsBytes>(to + kTileBytes - kMinsBytes, from.mins, lane);
}

// `tokens`: of each place, or -1.
__device__ __forceinline__ void find_activations(Sources& from, const uint8_t* values,
                                                 const float* scales, const float* sums,
                                                 int64_t blocks, int64_t block,
                                                 const int* tokens) {
    from.has_values = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const int number = i * kThreads + threadIdx.x;
        const int place = number / (kValueBytes / 16), piece = number % (kValueBytes / 16);
        const int token = place < kBlockTokens ? tokens[place] : -1;
        const int64_t at = token < 0 ? 0 : token;
        from.has_values |= (token >= 0 ? 1u : 0u) << i;
        if constexpr (kIntegers) {
            const int64_t index = (at / kTokens * blocks + block) * kTokens + at % kTokens;
            from.values[i] = values + index * kBlock + piece * 16;
        } else {
            from.values[i] = values + ((at * blocks + block) * kBlock + piece * 8) * 2;
        }
    }
    if constexpr (kIntegers) {
        const int token = threadIdx.x < kBlockTokens ? tokens[threadIdx.x] : -1;
        const int64_t at = token < 0 ? 0 : token;
        const int64_t index = (at / kTokens * blocks + block) * kTokens + at % kTokens;
        from.has_scale = token >= 0;
        from.x_scale = scales + index;
        if constexpr (kMins) from.x_sum = sums + index;
    }
}

__device__ __forceinline__ void copy_activations(uint8_t* stage, Sources& from) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
        const int number = i * kThreads + threadIdx.x;
        if (kPieces * kThreads > kBlockTokens * (kValueBytes / 16) &&
            number >= kBlockTokens * (kValueBytes / 16)) {
            break;
        }
        int to = number * 16;
        if constexpr (!kIntegers) {
            // Two halves of 32 columns, each with its tokens side by side.
            const int place = number / 8, piece = number % 8;
            to = (piece / 4 * kBlockTokens + place) * kBlock + piece % 4 * 16;
        }
        copy16(stage + kValuesAt + to, from.values[i], from.has_values >> i & 1);
        from.values[i] += kIntegers ? kTokens * kBlock : 2 * kBlock;
    }
    if constexpr (kIntegers) {
        if (threadIdx.x < kBlockTokens) {
            copy4(stage + kXScalesAt + threadIdx.x * 4, from.x_scale, from.has_scale);
            if constexpr (kMins) copy4(stage + kXSumsAt + threadIdx.x * 4, from.x_sum, from.has_scale);
        }
        from.x_scale += kTokens;
        if constexpr (kMins) from.x_sum += kTokens;
    }
}

// d = a[16 x 32] * b[32 x 8] + c, all c alike.
__device__ __forceinline__ void begin_bytes(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1, int32_t c) {
    if constexpr (kUnsignedCodes) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%10, %10, %10, %10};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c));
    } else {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%10, %10, %10, %10};"
            : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c));
    }
}

// sums += the warp's tile times all tokens, in one block of columns.
__device__ __forceinline__ void multiply_stage(const uint8_t* stage, const Table& table, float unit,
                                               int warp, int lane,
                                               float (&sums)[kTokenTiles][4]) {
    const uint8_t* from = stage + warp * kTileBytes;
    Tile tile;
    read_tile<false>(from, from + kCodesBytes, from + kCodesBytes + kHighBytes,
                     from + kTileBytes - kMinsBytes, lane, tile);
    Operand a;
    prepare(tile, table, unit, a);
    const uint8_t* values = stage + kValuesAt + lane * 16;
    const float* scales = reinterpret_cast<const float*>(stage + kXScalesAt) + lane % 4 * 2;
    const float* x_sums = reinterpret_cast<const float*>(stage + kXSumsAt) + lane % 4 * 2;
    // As float32 these bits are 1.5 * 2**23; see `multiply_tiles` in products.cu.
    constexpr int32_t kRounder = 0x4b400000;
    const float less[2] = {-12582912.0f * a.scale[0], -12582912.0f * a.scale[1]};
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
        const uint4 low = *reinterpret_cast<const uint4*>(values + n * kTokens * kBlock);
        if constexpr (kIntegers) {
            int32_t total[4];
            begin_bytes(total, a.words[0], low.x, low.y, kRounder);
            multiply_bytes<kUnsignedCodes>(total, a.words[1], low.z, low.w);
            const float2 scale = *reinterpret_cast<const float2*>(scales + n * kTokens);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float value = __int_as_float(total[i]), own = i & 1 ? scale.y : scale.x;
                if constexpr (kShortScale) {
                    sums[n][i] =
                        fmaf(fmaf(value, a.scale[i >> 1], less[i >> 1]), own, sums[n][i]);
                } else {
                    sums[n][i] = fmaf(value - 12582912.0f, a.scale[i >> 1] * own, sums[n][i]);
                }
            }
            if constexpr (kMins) {
                const float2 sum = *reinterpret_cast<const float2*>(x_sums + n * kTokens);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[n][i] = fmaf(a.min[i >> 1], i & 1 ? sum.y : sum.x, sums[n][i]);
                }
            }
        } else {
            const uint4 high =
                *reinterpret_cast<const uint4*>(values + (kBlockTokens + n * kTokens) * kBlock);
            multiply_floats(a, low, high, sums[n]);
        }
    }
}

// Grid: SPLITS; rows / 128, rounded up; tokens / (8 * TOKEN_TILES), rounded up, or groups.
// Shared memory: the larger of STAGES stages and the sums. For the rest see `multiply_few`.
extern "C" __global__ void __cluster_dims__(kSplits, 1, 1) __launch_bounds__(kThreads, THREAD_BLOCKS)
multiply_batch(const uint8_t* codes, const uint8_t* high, const uint8_t* scales,
               const uint8_t* mins, const uint8_t* values, const float* x_scales,
               const float* x_sums, uint16_t* out, int64_t blocks, int rows, int tokens, float unit,
               uint4 table_words, const uint4* groups, const int* pairs, int share) {
    extern __shared__ __align__(16) uint8_t memory[];
    __shared__ int places[kBlockTokens], results[kBlockTokens];
    const Weight w{codes, high, scales, mins, blocks};
    const Table table{{table_words.x, table_words.y, table_words.z, table_words.w}};
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int64_t row_tiles = (rows + kRows - 1) / kRows;
    const int64_t per_split = (blocks + kSplits - 1) / kSplits;
    const int64_t first = blockIdx.x * per_split, last = min(first + per_split, blocks);
    int64_t first_of_expert = 0, start = static_cast<int64_t>(blockIdx.z) * kBlockTokens;
    let_next_begin();
    if constexpr (kGrouped) {
        wait_for_inputs();
        const uint4 group = groups[blockIdx.z];
        tokens = static_cast<int>(group.z);
        if (tokens == 0) return;  // the whole cluster does
        start = group.y;
        first_of_expert = group.x * row_tiles;
    } else {
        tokens -= static_cast<int>(start);
    }
    tokens = min(tokens, kBlockTokens);
    if (threadIdx.x < kBlockTokens) {
        const int place = threadIdx.x;
        int result = -1, token = -1;
        if (place < tokens) {
            result = kGrouped ? pairs[start + place] : static_cast<int>(start) + place;
            token = kGrouped ? result / share : result;
        }
        results[place] = result, places[place] = token;
    }
    const int64_t own = static_cast<int64_t>(blockIdx.y) * kWarps + warp;
    const int64_t row_tile = first_of_expert + min(own, row_tiles - 1);
    // Weights come before the activations are there.
    Sources from;
    find_tile(from, w, row_tile, first, lane);
#pragma unroll
    for (int i = 0; i < kStages - kStep; ++i) {
        if (first + i < last) copy_tile(memory + i * kStageBytes, from, warp, lane);
    }
    if constexpr (!kGrouped) wait_for_inputs();
    __syncthreads();
    find_activations(from, values, x_scales, x_sums, blocks, first, places);
#pragma unroll
    for (int i = 0; i < kStages - kStep; ++i) {
        if (first + i < last) copy_activations(memory + i * kStageBytes, from);
        end_stage();
    }
    float sums[kTokenTiles][4] = {};
    int stage = 0, ahead = kStages - kStep;
    const int count = static_cast<int>(last - first);
    for (int block = 0; block < count; block += kStep) {
        wait_for_stages<kStages - 2 * kStep>();
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
            if (block + i + kStages - kStep < count) {
                uint8_t* to = memory + ahead * kStageBytes;
                copy_tile(to, from, warp, lane);
                copy_activations(to, from);
            }
            end_stage();
            ahead = ahead + 1 == kStages ? 0 : ahead + 1;
        }
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
            if (block + i < count) {
                multiply_stage(memory + stage * kStageBytes, table, unit * kCodeUnit, warp, lane,
                               sums);
            }
            stage = stage + 1 == kStages ? 0 : stage + 1;
        }
    }
    __syncthreads();
    float* all = reinterpret_cast<float*>(memory);  // [token][row]
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = n * kTokens + lane % 4 * 2 + (i & 1);
            all[token * kSumsStride + warp * kRows + lane / 4 + (i >> 1) * 8] = sums[n][i];
        }
    }
    if constexpr (kSplits > 1) {
        sync_cluster();
    } else {
        __syncthreads();
    }
    // Two rows of a token at a time; rows are multiples of 16.
    const int row = static_cast<int>(threadIdx.x) % (kBlockRows / 2) * 2;
    const int64_t to_row = static_cast<int64_t>(blockIdx.y) * kBlockRows + row;
    constexpr int kAtOnce = kThreads / (kBlockRows / 2);
    const int first_token = static_cast<int>(threadIdx.x) / (kBlockRows / 2);
    for (int i = first_token * kSplits + blockIdx.x; i < tokens; i += kAtOnce * kSplits) {
        float2 sum = make_float2(0, 0);
#pragma unroll
        for (int split = 0; split < kSplits; ++split) {
            const float* at = all + i * kSumsStride + row;
            float2 part;
            if constexpr (kSplits > 1) {
                part = read_peer(at, split);
            } else {
                part = *reinterpret_cast<const float2*>(at);
            }
            sum.x += part.x, sum.y += part.y;
        }
        if (to_row + 1 < rows) {
            *reinterpret_cast<uint32_t*>(out + static_cast<int64_t>(results[i]) * rows + to_row) =
                pair_bfloat16(sum.x, sum.y);
        } else if (to_row < rows) {
            out[static_cast<int64_t>(results[i]) * rows + to_row] = float_to_bfloat16(sum.x);
        }
    }
    if constexpr (kSplits > 1) sync_cluster();  // others may still read this block's sums
}

// Products of a low-bit weight with many tokens, on Hopper's asynchronous tensor cores (sm_90a).
//
// A thread block multiplies 128 * ROW_TILES rows by TILE_TOKENS tokens. Two warpgroups of 64 rows
// (ROW_TILES times) each read their weights straight from memory, DEPTH blocks of 64 columns ahead,
// and make bfloat16 of a block in registers while the tensor cores multiply the one before it. One
// thread has the tokens' activations copied to shared memory, STAGES blocks of columns ahead.
//
// A cluster has SPLITS thread blocks that share the columns, whose sums are added in their order,
// times SHARERS that take neighbouring rows and copy activations for each other.
//
// Activations [block][token][64] are as activations.cu writes them: where the tensor cores look
// for them, with columns in the order of the weight's lanes.
#include "common.cuh"
#include "weights.cuh"
#include "wgmma.cuh"

constexpr int kTileTokens = TILE_TOKENS;
constexpr int kAtOnce = AT_ONCE;  // tokens of one instruction
constexpr int kRowTiles = ROW_TILES;
constexpr int kDepth = DEPTH;
constexpr int kStages = STAGES;
constexpr int kSplits = SPLITS;
constexpr int kSharers = SHARERS;
constexpr int kGroup = 16;  // tiles of tokens that run side by side

constexpr int kParts = kTileTokens / kAtOnce;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlockRows = 128 * kRowTiles;
constexpr int kTokenBytes = kBlock * 2;
constexpr int kStageBytes = kTileTokens * kTokenBytes;
constexpr int kSumsStride = kBlockRows + 4;      // floats
constexpr int kResultStride = kBlockRows * 2 + 16;  // bytes
static_assert(kDepth % 2 == 0 && kTileTokens % kAtOnce == 0);

__device__ __forceinline__ uint32_t shared_address(const void* at) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}
__device__ __forceinline__ uint32_t peer_address(uint32_t address, uint32_t peer) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(peer));
    return there;
}
__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t peer) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                     peer_address(barrier, peer))
                 : "memory");
}
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{.reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// Begins to copy to shared memory, of all thread blocks in `peers` at the same place.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes,
                                          uint32_t barrier, uint32_t peers) {
    if constexpr (kSharers > 1) {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1], %2, [%3], %4;" ::"r"(to),
            "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(peers))
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
            "[%3];" ::"r"(to),
            "l"(from), "r"(bytes), "r"(barrier)
            : "memory");
    }
}

// Tokens of 128 bytes in shared memory, eight to a swizzled kilobyte, as the tensor cores are told.
__device__ __forceinline__ uint64_t describe_tokens(uint32_t address) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | uint64_t(1) << 16 |
           uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

__device__ __forceinline__ uint32_t multiply_two(uint32_t a, uint32_t b) {
    uint32_t v;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}
__device__ __forceinline__ uint32_t multiply_add_two(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t v;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    return v;
}
__device__ __forceinline__ uint32_t round_two(float low, float high) {
    uint32_t v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}

// Levels of a format that looks them up, as bfloat16: their low and their high bytes.
struct Levels {
    Table low;
    Table high;
};

// Four numbers of a row half and a group of columns as pairs (0, 2) and (1, 3) of bfloat16, before
// scale and minimum; exact but for the tables' levels, which are rounded.
__device__ __forceinline__ void take_levels(const Tile& tile, int half, int group,
                                            const Levels& levels, uint32_t (&pairs)[2]) {
    constexpr uint32_t kOne = 0x3f803f80u;
    constexpr uint32_t kInteger = 0x43004300u;  // 128: its last bits count in ones
    constexpr int kBits = kLowBits + kHighBits;
    if constexpr (kKind == 0 && kBits == 8) {
        // A signed byte: 128 and its seven bits, less 128 or, with the sign, 256.
        const uint32_t word = tile.low[(group >> 1) * 4 + half * 2 + (group & 1)];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t two = word >> (8 * i);
            pairs[i] = multiply_add_two((two & 0x00800080u) | kInteger, 0xbf80bf80u,
                                        (two & 0x007f007fu) | kInteger);
        }
    } else if constexpr (kKind == 0) {
        constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x10001u;
        constexpr uint32_t kOffset =  // minus 128, or what stands for zero
            kMins ? 0xc300c300u : (0xc300u + (1u << (kBits - 1))) * 0x10001u;
        const bool direct = kHighBits == 0;
        const uint32_t codes = direct ? tile.low[half * 2 + (group & 1)] >> (group >> 1) * 4
                                      : take_codes(tile, half, group);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            pairs[i] =
                multiply_add_two((codes >> (8 * i) & kMask) | kInteger, kOne, kOffset);
        }
    } else if constexpr (kKind == 1) {
        const uint32_t codes = take_codes(tile, half, group);
        const uint32_t low = look_up(levels.low, codes), high = look_up(levels.high, codes);
        pairs[0] = __byte_perm(low, high, 0x6240);
        pairs[1] = __byte_perm(low, high, 0x7351);
    } else {
        uint32_t beside[2];
        take_floats(tile, half, group, beside);
        pairs[0] = __byte_perm(beside[0], beside[1], 0x5410);
        pairs[1] = __byte_perm(beside[0], beside[1], 0x7632);
    }
}

// A tile's weights in bfloat16, [group] as `multiply_pairs` takes rows.
//
// A scale of a float16's digits is the sum of two numbers in bfloat16, and its products with levels
// of up to four digits are rounded once. Others are off by less than 2**-16 before they are rounded.
__device__ __forceinline__ void dequantize(const Tile& tile, const Levels& levels,
                                           uint32_t (&to)[4][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float scale = tile.scale[half];
        const uint32_t most = round_two(scale, scale);
        const float left = scale - __uint_as_float(most & 0xffff0000u);
        const uint32_t rest = round_two(left, left);
#pragma unroll
        for (int group = 0; group < 4; ++group) {
            uint32_t pairs[2];
            take_levels(tile, half, group, levels, pairs);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint32_t& word = to[group][half + 2 * i];
                if constexpr (kMins) {
                    const float low = __uint_as_float(pairs[i] << 16);
                    const float high = __uint_as_float(pairs[i] & 0xffff0000u);
                    word = round_two(fmaf(low, scale, tile.min[half]),
                                     fmaf(high, scale, tile.min[half]));
                } else if constexpr (kScaleBytes == 0) {
                    word = pairs[i];
                } else {
                    word = multiply_add_two(pairs[i], most, multiply_two(pairs[i], rest));
                }
            }
        }
    }
}

// Grid: SPLITS; SHARERS * row blocks / SHARERS, rounded up, * tiles of tokens. Shared memory: the
// largest of STAGES stages, the sums and the result, and two barriers of 8 bytes a stage.
extern "C" __global__ void __cluster_dims__(kSplits, kSharers, 1)
    __launch_bounds__(kThreads, THREAD_BLOCKS)
multiply_wide(const uint8_t* codes, const uint8_t* high, const uint8_t* scales,
              const uint8_t* mins, const uint8_t* x, uint16_t* out, int64_t blocks, int rows,
              int first_block_of_rows, int row_blocks, int tokens, uint4 low_levels,
              uint4 high_levels, int barriers_at) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const Weight w{codes, high, scales, mins, blocks};
    const Levels levels{{{low_levels.x, low_levels.y, low_levels.z, low_levels.w}},
                        {{high_levels.x, high_levels.y, high_levels.z, high_levels.w}}};
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const uint32_t stages = shared_address(memory), full = stages + barriers_at;
    const uint32_t empty = full + kStages * 8;
    // Which rows and tokens: tiles of tokens side by side, in groups.
    const int sharer = blockIdx.y % kSharers;
    int index = blockIdx.y / kSharers;
    const int row_groups = (row_blocks + kSharers - 1) / kSharers;
    const int token_tiles = (tokens + kTileTokens - 1) / kTileTokens;
    const int group = index / (kGroup * row_groups);
    index -= group * kGroup * row_groups;
    const int beside = min(kGroup, token_tiles - group * kGroup);
    const int row_block = first_block_of_rows + index / beside * kSharers + sharer;
    const int first_token = (group * kGroup + index % beside) * kTileTokens;
    // Which columns.
    const int64_t per_split = (blocks + kSplits - 1) / kSplits;
    const int64_t first = min(blockIdx.x * per_split, blocks);
    const int count = static_cast<int>(min(per_split, blocks - first));
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            init_barrier(full + i * 8, 1);
            init_barrier(empty + i * 8, kWarps * kSharers);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    let_next_begin();
    float sums[kRowTiles][kParts][kAtOnce / 2] = {};
    if constexpr (kSharers > 1) {
        sync_cluster();
    } else {
        __syncthreads();
    }
    // The first thread copies, or begins to; blocks of columns are `padded` tokens apart.
    const int64_t padded = (tokens + kTokens - 1) / kTokens * kTokens;
    const int own_tokens = min(kTileTokens, static_cast<int>(padded) - first_token);
    constexpr int kShare = kTileTokens / kSharers;
    const int shared_tokens = max(0, min(kShare, own_tokens - sharer * kShare));
    const uint8_t* from = x + (first * padded + first_token + sharer * kShare) * kTokenBytes;
    const auto copy_block = [&](uint32_t stage) {
        uint32_t peers = 0;
#pragma unroll
        for (int i = 0; i < kSharers; ++i) peers |= 1u << (i * kSplits + blockIdx.x);
        expect_bytes(full + stage * 8, own_tokens * kTokenBytes);
        if (shared_tokens > 0) {
            copy_bulk(stages + stage * kStageBytes + sharer * kShare * kTokenBytes, from,
                      shared_tokens * kTokenBytes, full + stage * 8, peers);
        }
        from += padded * kTokenBytes;
    };
    const int64_t row_tiles = (rows + kRows - 1) / kRows;
    int64_t own[kRowTiles];
    Tile ahead[kDepth][kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
        own[r] = ((static_cast<int64_t>(row_block) * 2 + warp / 4) * kRowTiles + r) * 4 + warp % 4;
        own[r] = min(own[r], row_tiles - 1);
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            load_tile(w, own[r], min(first + i, blocks - 1), lane, ahead[i][r]);
        }
    }
    if (threadIdx.x == 0) {
        wait_for_inputs();
        for (int i = 0; i < min(kStages, count); ++i) copy_block(i);
    }
    __syncwarp();
    const uint64_t described = describe_tokens(stages);
    uint32_t weights[2][kRowTiles][4][4];
    // Of the block that is multiplied, and of those one and two before it.
    uint32_t stage = 0, parity = 0, last_stage = 0, free_stage = 0, free_parity = 0;
    for (int start = 0; start < count; start += kDepth) {
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            const int block = start + i;
            if (block < count) {
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r) {
                    dequantize(ahead[i][r], levels, weights[i & 1][r]);
                    load_tile(w, own[r], min(first + block + kDepth, blocks - 1), lane,
                              ahead[i][r]);
                }
                wait_for_phase(full + stage * 8, parity);
                const uint64_t at = described + stage * (kStageBytes >> 4);
                begin_async();
#pragma unroll
                for (int group = 0; group < 4; ++group) {
#pragma unroll
                    for (int part = 0; part < kParts; ++part) {
#pragma unroll
                        for (int r = 0; r < kRowTiles; ++r) {
                            multiply_async<kAtOnce>(
                                sums[r][part], weights[i & 1][r][group],
                                at + ((part * kAtOnce * kTokenBytes + group * 32) >> 4));
                        }
                    }
                }
                end_async();
                if (threadIdx.x == 0 && block >= 2 && block - 2 + kStages < count) {
                    wait_for_phase(empty + free_stage * 8, free_parity);
                    copy_block(free_stage);
                }
                __syncwarp();
                if (block >= 2 && ++free_stage == kStages) free_stage = 0, free_parity ^= 1;
                wait_for_async<1>();
                // The block before this one is done with.
                if (block > 0) {
                    if constexpr (kSharers > 1) {
                        if (lane < kSharers) {
                            arrive_at(empty + last_stage * 8, lane * kSplits + blockIdx.x);
                        }
                    } else {
                        if (lane == 0) arrive(empty + last_stage * 8);
                    }
                }
                last_stage = stage;
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
        }
    }
    wait_for_async<0>();
    __syncthreads();
    const int first_row = row_block * kBlockRows;
    const int written = min(kTileTokens, tokens - first_token);
    if constexpr (kSplits == 1) {
        {
            // Transposed to [token][row], eight by eight.
            const int token = lane / 16 * 8 + lane % 8;
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) {
                const int row = ((warp / 4 * kRowTiles + r) * 4 + warp % 4) * kRows +
                                (lane / 8 & 1) * 8;
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
#pragma unroll
                    for (int n = 0; n < kAtOnce / 16; ++n) {
                        const float* v = sums[r][part] + n * 8;
                        const uint32_t to = stages + row * 2 +
                                            (part * kAtOnce + n * 16 + token) * kResultStride;
                        asm volatile(
                            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, "
                            "%4};" ::"r"(to),
                            "r"(round_two(v[0], v[1])), "r"(round_two(v[2], v[3])),
                            "r"(round_two(v[4], v[5])), "r"(round_two(v[6], v[7]))
                            : "memory");
                    }
                }
            }
        }
        __syncthreads();
        constexpr int kPieces = kBlockRows / 8;
        for (int i = threadIdx.x; i < written * kPieces; i += kThreads) {
            const int token = i / kPieces, row = i % kPieces * 8;
            const uint4 v = *reinterpret_cast<const uint4*>(memory + token * kResultStride + row * 2);
            uint16_t* to = out + static_cast<int64_t>(first_token + token) * rows + first_row + row;
            if (rows % 8 == 0) {
                if (first_row + row < rows) *reinterpret_cast<uint4*>(to) = v;
            } else {
                const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    if (first_row + row + j < rows) to[j] = words[j / 2] >> (j % 2 * 16);
                }
            }
        }
        if constexpr (kSharers > 1) sync_cluster();  // others may still arrive at this block
        return;
    }
    float* all = reinterpret_cast<float*>(memory);  // [token][row]
    {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
            const int row =
                ((warp / 4 * kRowTiles + r) * 4 + warp % 4) * kRows + lane / 4;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
#pragma unroll
                for (int i = 0; i < kAtOnce / 2; ++i) {
                    const int token = part * kAtOnce + i / 4 * 8 + lane % 4 * 2 + (i & 1);
                    all[token * kSumsStride + row + (i >> 1 & 1) * 8] = sums[r][part][i];
                }
            }
        }
    }
    sync_cluster();
    constexpr int kPieces = kBlockRows / 4;
    for (int i = threadIdx.x;; i += kThreads) {
        const int token = i / kPieces * kSplits + blockIdx.x, row = i % kPieces * 4;
        if (token >= written) break;
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int split = 0; split < kSplits; ++split) {
            const uint32_t at = peer_address(shared_address(all + token * kSumsStride + row),
                                             sharer * kSplits + split);
            float v[4];
            asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                         : "r"(at)
                         : "memory");
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[j] += v[j];
        }
        uint16_t* to = out + static_cast<int64_t>(first_token + token) * rows + first_row + row;
        if (rows % 4 == 0) {
            if (first_row + row < rows) {
                *reinterpret_cast<uint2*>(to) =
                    make_uint2(round_two(sum[0], sum[1]), round_two(sum[2], sum[3]));
            }
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (first_row + row + j < rows) to[j] = float_to_bfloat16(sum[j]);
            }
        }
    }
    sync_cluster();  // others may still read this block's sums
}

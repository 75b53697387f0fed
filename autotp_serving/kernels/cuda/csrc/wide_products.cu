// Products of a low-bit weight with many tokens, on Hopper's asynchronous tensor cores (sm_90a).
//
// A thread block multiplies TOKENS tokens by 64 rows for each of its WARPGROUPS. Warps copy their weights to shared memory, DEPTH blocks of 64 columns ahead, and
// make bfloat16 of a block in registers while the tensor cores multiply the one before it. One
// thread has the tokens' activations copied to shared memory, STAGES blocks of columns ahead.
//
// SPLITS thread blocks, a cluster, share the columns; each adds up the sums of all for some of the
// tokens, in their order.
//
// Activations [block][token][64] are as activations.cu writes them: where the tensor cores look
// for them, with columns in the order of the weight's lanes.
#include "common.cuh"
#include "weights.cuh"
#include "wgmma.cuh"

constexpr int kTileTokens = TOKENS;
constexpr int kDepth = DEPTH;
constexpr int kStages = STAGES;
constexpr int kSplits = SPLITS;
constexpr int kWarpgroups = WARPGROUPS;
constexpr int kGroup = 16;  // tiles of tokens that run side by side
constexpr int kLag = 2;     // blocks after which a stage is filled again

constexpr int kWarps = 4 * kWarpgroups;
constexpr int kThreads = kWarps * kLanes;
constexpr int kBlockRows = kWarps * kRows;
constexpr int kTokenBytes = kBlock * 2;
constexpr int kStageBytes = kTileTokens * kTokenBytes;
constexpr int kTileBytes = kCodesBytes + kHighBytes + kScalesBytes + kMinsBytes;
constexpr int kSumsStride = kBlockRows + 4;         // floats
constexpr int kResultStride = kBlockRows * 2 + 16;  // bytes

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

__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes,
                                          uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
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
// Levels of a format that looks them up, as bfloat16: their low and their high bytes.
struct Levels {
    Table low;
    Table high;
};

// Four numbers of a row half and a group of columns as pairs (0, 2) and (1, 3) of bfloat16, before
// scale and minimum; exact but for the tables' levels, which are rounded. Small floats that have a
// scale are 2**-112 as large.
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
        // Sign, exponent and mantissa where bfloat16 has them, but 2**-112 as large.
        constexpr int kShift = 7 - kMantissaBits;
        constexpr uint32_t kMagnitude = ((1u << (kBits - 1)) - 1) * 0x10001u << kShift;
        const uint32_t codes = take_codes(tile, half, group);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t two = codes >> (8 * i);
            pairs[i] = (two << kShift & kMagnitude) | (two << (16 - kBits) & 0x80008000u);
            if constexpr (kScaleBytes == 0) {
                pairs[i] = multiply_add_two(pairs[i], 0x77807780u, 0x80008000u);
            }
        }
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
        // Of floats it makes up for what `take_levels` leaves out. It must stay below 65,408, which
        // fp6 reaches at weights of 447, fp8 at 114,000.
        const float scale = tile.scale[half] * (kKind == 2 ? 0x1p112f : 1.0f);
        const uint32_t most = pair_bfloat16(scale, scale);
        const float left = scale - __uint_as_float(most & 0xffff0000u);
        const uint32_t rest = pair_bfloat16(left, left);
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
                    word = pair_bfloat16(fmaf(low, scale, tile.min[half]),
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

// Where a lane copies a tile of its warp's rows from, block after block.
struct Source {
    const uint8_t* codes;
    const uint8_t* high;
    const uint8_t* scales;
    const uint8_t* mins;
};

template <int kBytes>
__device__ __forceinline__ void copy_part(uint32_t to, const uint8_t*& from, int lane) {
#pragma unroll
    for (int i = 0; i < kBytes; i += 16 * kLanes) {
        if (i + 16 * kLanes <= kBytes || i + lane * 16 < kBytes) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i + lane * 16),
                         "l"(from + i)
                         : "memory");
        }
    }
    from += kBytes;
}
__device__ __forceinline__ void copy_next(uint32_t to, Source& from, int lane) {
    copy_part<kCodesBytes>(to, from.codes, lane);
    copy_part<kHighBytes>(to + kCodesBytes, from.high, lane);
    copy_part<kScalesBytes>(to + kCodesBytes + kHighBytes, from.scales, lane);
    copy_part<kMinsBytes>(to + kTileBytes - kMinsBytes, from.mins, lane);
}

// Grid: SPLITS; blocks of rows * tiles of tokens. Shared memory: the largest of STAGES stages, the
// sums and the result; weights; two barriers of 8 bytes a stage.
extern "C" __global__ void __cluster_dims__(kSplits, 1, 1) __launch_bounds__(kThreads, 1)
multiply_wide(const uint8_t* codes, const uint8_t* high, const uint8_t* scales,
              const uint8_t* mins, const uint8_t* x, uint16_t* out, int64_t blocks, int rows,
              int first_block_of_rows, int row_blocks, int tokens, uint4 low_levels,
              uint4 high_levels, int weights_at, int barriers_at) {
    extern __shared__ __align__(1024) uint8_t memory[];
    const Levels levels{{{low_levels.x, low_levels.y, low_levels.z, low_levels.w}},
                        {{high_levels.x, high_levels.y, high_levels.z, high_levels.w}}};
    const int lane = threadIdx.x % kLanes;
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kLanes, 0);  // alike, as is known then
    const uint32_t stages = shared_address(memory), full = stages + barriers_at;
    const uint32_t empty = full + kStages * 8;
    // Which rows and tokens: tiles of tokens side by side, in groups.
    const int token_tiles = (tokens + kTileTokens - 1) / kTileTokens;
    const int group = blockIdx.y / (kGroup * row_blocks);
    const int index = blockIdx.y % (kGroup * row_blocks);
    const int beside = min(kGroup, token_tiles - group * kGroup);
    const int row_block = first_block_of_rows + index / beside;
    const int first_token = (group * kGroup + index % beside) * kTileTokens;
    // Which columns.
    const int64_t per_split = (blocks + kSplits - 1) / kSplits;
    const int64_t first = min(blockIdx.x * per_split, blocks);
    const int count = static_cast<int>(min(per_split, blocks - first));
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            init_barrier(full + i * 8, 1);
            init_barrier(empty + i * 8, kWarps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    let_next_begin();
    float sums[kTileTokens / 2] = {};
    __syncthreads();
    // The first thread copies, or begins to; blocks of columns are `padded` tokens apart.
    const int64_t padded = (tokens + kTokens - 1) / kTokens * kTokens;
    const int own_tokens = min(kTileTokens, static_cast<int>(padded) - first_token);
    const uint8_t* from = x + (first * padded + first_token) * kTokenBytes;
    const auto copy_block = [&](uint32_t stage) {
        expect_bytes(full + stage * 8, own_tokens * kTokenBytes);
        copy_bulk(stages + stage * kStageBytes, from, own_tokens * kTokenBytes, full + stage * 8);
        from += padded * kTokenBytes;
    };
    const int64_t row_tiles = (rows + kRows - 1) / kRows;
    const int64_t tile = static_cast<int64_t>(row_block) * kWarps + warp;
    const int64_t begin = min(tile, row_tiles - 1) * blocks + first;
    Source own{codes + begin * kCodesBytes + lane * 16, high + begin * kHighBytes + lane * 16,
               scales + begin * kScalesBytes + lane * 16, mins + begin * kMinsBytes + lane * 16};
    uint8_t* const ahead = memory + weights_at + warp * kDepth * kTileBytes;
    const auto copy_weights = [&](int slot, bool is_there) {
        if (is_there) copy_next(shared_address(ahead + slot * kTileBytes), own, lane);
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int i = 0; i < kDepth - 1; ++i) copy_weights(i, i < count);
    if (threadIdx.x == 0) {
        wait_for_inputs();
        for (int i = 0; i < min(kStages, count); ++i) copy_block(i);
    }
    __syncwarp();
    const uint64_t described = describe_tokens(stages);
    uint32_t weights[2][4][4];
    // Of the block that is multiplied, the one before it and that whose stage is filled again.
    uint32_t stage = 0, parity = 0, last_stage = 0, free_stage = 0, free_parity = 0;
    int slot = 0;
    const auto multiply_block = [&](int block, uint32_t(&made)[4][4]) {
        asm volatile("cp.async.wait_group %0;" ::"n"(kDepth - 2) : "memory");
        __syncwarp();
        const uint8_t* from = ahead + slot * kTileBytes;
        Tile tile;
        read_tile<false>(from, from + kCodesBytes, from + kCodesBytes + kHighBytes,
                         from + kTileBytes - kMinsBytes, lane, tile);
        dequantize(tile, levels, made);
        // In the place of the block before this one.
        copy_weights(slot == 0 ? kDepth - 1 : slot - 1, block + kDepth - 1 < count);
        slot = slot + 1 == kDepth ? 0 : slot + 1;
        wait_for_phase(full + stage * 8, parity);
        const uint64_t at = described + stage * (kStageBytes >> 4);
        begin_async();
#pragma unroll
        for (int group = 0; group < 4; ++group) {
            multiply_async<kTileTokens>(sums, made[group], at + (group * 32 >> 4));
        }
        end_async();
        if (threadIdx.x == 0 && block >= kLag && block - kLag + kStages < count) {
            wait_for_phase(empty + free_stage * 8, free_parity);
            copy_block(free_stage);
        }
        __syncwarp();
        if (block >= kLag && ++free_stage == kStages) free_stage = 0, free_parity ^= 1;
        wait_for_async<1>();
        // The block before this one is done with.
        if (block > 0 && lane == 0) arrive(empty + last_stage * 8);
        last_stage = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
    };
    for (int block = 0; block + 1 < count; block += 2) {
        multiply_block(block, weights[0]);
        multiply_block(block + 1, weights[1]);
    }
    if (count % 2 != 0) multiply_block(count - 1, weights[0]);
    wait_for_async<0>();
    __syncthreads();
    const int first_row = row_block * kBlockRows;
    const int written = min(kTileTokens, tokens - first_token);
    if constexpr (kSplits == 1) {
        // Transposed to [token][row], eight by eight.
        const uint32_t to = stages + (warp * kRows + (lane / 8 & 1) * 8) * 2 +
                            (lane / 16 * 8 + lane % 8) * kResultStride;
#pragma unroll
        for (int n = 0; n < kTileTokens / 16; ++n) {
            const float* v = sums + n * 8;
            asm volatile(
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                    to + n * 16 * kResultStride),
                "r"(pair_bfloat16(v[0], v[1])), "r"(pair_bfloat16(v[2], v[3])),
                "r"(pair_bfloat16(v[4], v[5])), "r"(pair_bfloat16(v[6], v[7]))
                : "memory");
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
        return;
    }
    float* all = reinterpret_cast<float*>(memory);  // [token][row]
#pragma unroll
    for (int i = 0; i < kTileTokens / 2; ++i) {
        const int token = i / 4 * 8 + lane % 4 * 2 + (i & 1);
        all[token * kSumsStride + warp * kRows + lane / 4 + (i >> 1 & 1) * 8] = sums[i];
    }
    sync_cluster();
    constexpr int kPieces = kBlockRows / 4;
    for (int i = threadIdx.x;; i += kThreads) {
        const int token = i / kPieces * kSplits + blockIdx.x, row = i % kPieces * 4;
        if (token >= written) break;
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int split = 0; split < kSplits; ++split) {
            const uint32_t at = peer_address(shared_address(all + token * kSumsStride + row), split);
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
                    make_uint2(pair_bfloat16(sum[0], sum[1]), pair_bfloat16(sum[2], sum[3]));
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

// Products of a bfloat16 weight with many tokens, on Hopper's asynchronous tensor cores (sm_90a).
//
// A thread block multiplies 128 tokens, 64 for each of two warpgroups, by ROWS rows of the weight;
// the two of a cluster take neighbouring tokens and the same rows, of which each copies a half for
// both. One thread of a third warpgroup has the copies made, STAGES blocks of 64 columns ahead. Thread
// blocks stay and take one tile after another, so that copies for the next begin before a tile is
// written.
//
// GATED: the weight has gate's rows and then up's. A tile has as many of either, and what is written
// is the gated activation.
#include "common.cuh"
#include "barriers.cuh"
#include "wgmma.cuh"

constexpr int kTileRows = ROWS;
constexpr int kStages = STAGES;
constexpr bool kGated = GATED;

constexpr int kCluster = 2;
constexpr int kWarpgroups = 2;
constexpr int kWarps = 4 * kWarpgroups;
constexpr int kGroupTokens = 64;  // of a warpgroup
constexpr int kTileTokens = kWarpgroups * kGroupTokens;
constexpr int kGroup = 8;  // clusters' tokens that run side by side, for the second-level cache
constexpr int kRowBytes = kBlock * 2;
constexpr int kTokenBytes = kTileTokens * kRowBytes;
constexpr int kHalfBytes = kTileRows / 2 * kRowBytes;
constexpr int kStageBytes = kTokenBytes + 2 * kHalfBytes;
constexpr int kOutRows = kGated ? kTileRows / 2 : kTileRows;  // of a tile's result
constexpr int kChunk = 32;                                    // rows that a warp writes at once
constexpr int kChunkStride = kChunk * 2 + 16;                 // bytes
constexpr int kChunkBytes = 16 * kChunkStride;

// A matrix in memory, as the driver describes it for copies of boxes.
struct alignas(64) Matrix {
    uint8_t bytes[128];
};

__device__ __forceinline__ void copy_box(uint32_t to, const Matrix& from, int column, int row,
                                         uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&from), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
// The same into all thread blocks of the cluster.
__device__ __forceinline__ void copy_box_to_all(uint32_t to, const Matrix& from, int column,
                                                int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&from), "r"(column), "r"(row), "r"(barrier),
        "h"(static_cast<uint16_t>((1 << kCluster) - 1))
        : "memory");
}
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t peer) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                     peer_address(barrier, peer))
                 : "memory");
}
__device__ __forceinline__ void wait_for_cluster_phase(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{.reg .pred done;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// Where a tile begins.
struct Place {
    int token;
    int row_tile;
};

// Tiles in an order in which those that run at once share tokens and weights. Of `kGroup` clusters'
// tokens all rows are multiplied, then of the next.
__device__ __forceinline__ Place find_place(int index, int row_tiles, int pairs, int rank) {
    const int first = index / (row_tiles * kGroup) * kGroup;
    const int beside = min(kGroup, pairs - first);
    const int rest = index - first * row_tiles;
    return {((first + rest % beside) * kCluster + rank) * kTileTokens, rest / beside};
}

// Of a warp's 16 tokens, a tile's rows to memory.
__device__ __forceinline__ void write_tile(const float (&sums)[kTileRows / 2], uint8_t* staging,
                                           uint16_t* out, int first_token, int first_row,
                                           int tokens, int rows) {
    const int lane = threadIdx.x % kLanes;
    const uint32_t to = shared_address(staging) + lane % 16 * kChunkStride + lane / 16 * 16;
#pragma unroll
    for (int chunk = 0; chunk < kOutRows / kChunk; ++chunk) {
        __syncwarp();  // the chunk before this one has been read
#pragma unroll
        for (int n = 0; n < kChunk / 16; ++n) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = (chunk * (kChunk / 16) + n) * 8 + i * 2;
                float low = sums[at], high = sums[at + 1];
                if constexpr (kGated) {
                    low = multiply_gated(round_to_bfloat16(low),
                                         round_to_bfloat16(sums[kTileRows / 4 + at]));
                    high = multiply_gated(round_to_bfloat16(high),
                                          round_to_bfloat16(sums[kTileRows / 4 + at + 1]));
                }
                words[i] = pair_bfloat16(low, high);
            }
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                             to + n * 32),
                         "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                         : "memory");
        }
        __syncwarp();
        const int row = first_row + chunk * kChunk + lane % 4 * 8;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int beside = half * 8 + lane / 4, token = first_token + beside;
            const uint4 v = *reinterpret_cast<const uint4*>(staging + beside * kChunkStride +
                                                            lane % 4 * 16);
            if (token < tokens && row < rows) {
                *reinterpret_cast<uint4*>(out + static_cast<int64_t>(token) * rows + row) = v;
            }
        }
    }
}

// out [tokens, rows] = x [tokens, columns] * weight [rows (2 * rows where GATED), columns]
// transposed. `blocks` of 64 columns; columns past the last are zeros. `rows` is a multiple of 8.
// Grid: clusters of two, as many as run at once. Shared memory: aligned to 1,024 bytes here.
extern "C" __global__ void __cluster_dims__(kCluster, 1, 1)
    __launch_bounds__((kWarpgroups + 1) * 128, 1)
multiply_dense(const __grid_constant__ Matrix x, const __grid_constant__ Matrix weight,
               uint16_t* out, int blocks, int rows, int tokens) {
    extern __shared__ uint8_t unaligned[];
    uint8_t* const memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
    const uint32_t stages = shared_address(memory);
    uint8_t* const all_staging = memory + kStages * kStageBytes;
    const uint32_t full = shared_address(all_staging + kWarps * kChunkBytes);
    const uint32_t empty = full + kStages * 8;
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const int rank = blockIdx.x % kCluster;
    const int pairs = (tokens + kCluster * kTileTokens - 1) / (kCluster * kTileTokens);
    const int row_tiles = (rows + kOutRows - 1) / kOutRows;
    const int first = blockIdx.x / kCluster, step = gridDim.x / kCluster;
    const int tiles = pairs * row_tiles;
    let_next_begin();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            init_barrier(full + i * 8, 1);
            init_barrier(empty + i * 8, kCluster * kWarps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    sync_cluster();
    if (warp >= kWarps) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (warp == kWarps && lane == 0) {
            const auto copy_weight = [&](const Place& place, int block, uint32_t stage) {
                const int row = kGated ? rank * rows + place.row_tile * kOutRows
                                       : place.row_tile * kTileRows + rank * (kTileRows / 2);
                expect_bytes(full + stage * 8, kStageBytes);
                copy_box_to_all(stages + stage * kStageBytes + kTokenBytes + rank * kHalfBytes,
                                weight, block * kBlock, row, full + stage * 8);
            };
            // Weights are there before the kernels before this one are done.
            const int ahead = first < tiles ? min(kStages, blocks) : 0;
            for (int block = 0; block < ahead; ++block) {
                copy_weight(find_place(first, row_tiles, pairs, rank), block, block);
            }
            wait_for_inputs();
            uint32_t stage = 0, parity = 1;
            for (int tile = first; tile < tiles; tile += step) {
                const Place place = find_place(tile, row_tiles, pairs, rank);
                for (int block = 0; block < blocks; ++block) {
                    if (tile != first || block >= ahead) {
                        wait_for_cluster_phase(empty + stage * 8, parity);
                        copy_weight(place, block, stage);
                    }
                    copy_box(stages + stage * kStageBytes, x, block * kBlock, place.token,
                             full + stage * 8);
                    if (++stage == kStages) stage = 0, parity ^= 1;
                }
            }
        }
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int warpgroup = warp / 4;
        float sums[kTileRows / 2];
        uint32_t stage = 0, parity = 0, last_stage = 0;
        const auto release = [&](uint32_t done) {
            if (lane < kCluster) arrive_at(empty + done * 8, lane);
        };
        const uint64_t some_tokens =
            describe_rows(stages + warpgroup * kGroupTokens * kRowBytes);
        const uint64_t some_rows = describe_rows(stages + kTokenBytes);
        for (int tile = first; tile < tiles; tile += step) {
            for (int block = 0; block < blocks; ++block) {
                wait_for_phase(full + stage * 8, parity);
                const uint64_t offset = stage * (kStageBytes >> 4);
                begin_async();
#pragma unroll
                for (int group = 0; group < 4; ++group) {
                    multiply_shared<kTileRows>(sums, some_tokens + offset + group * 2,
                                               some_rows + offset + group * 2,
                                               block > 0 || group > 0);
                }
                end_async();
                wait_for_async<1>();
                if (block > 0) release(last_stage);
                last_stage = stage;
                if (++stage == kStages) stage = 0, parity ^= 1;
            }
            wait_for_async<0>();
            release(last_stage);
            const Place place = find_place(tile, row_tiles, pairs, rank);
            write_tile(sums, all_staging + warp * kChunkBytes, out, place.token + warp * 16,
                       place.row_tile * kOutRows, tokens, rows);
        }
    }
    sync_cluster();  // the other thread block may still arrive, or copy, here
}

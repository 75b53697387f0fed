// Products of a weight with few tokens, together with what follows them. Hopper.
//
// A decode step of a few streams is a chain of small kernels that wait for each other. Here a thread
// block does with its sums what the next kernel would do. Every number is computed as the separate
// kernels compute it (products.cu, activations.cu), in the same order: results agree to the bit.
//
// AFTER: 1 rotation of heads and the cache's writes; 2 silu(gate) * up, rounded to integers where
// the next product takes those (by clusters of four thread blocks, which hold a block of 64). A
// warp's two tiles of rows are those that belong together. WARPS, STAGED: as in products.cu.
#include "common.cuh"
#include "weights.cuh"
#include "fragments.cuh"
#include "quantize.cuh"

constexpr int kWarps = WARPS;
constexpr int kRowTiles = 2;
constexpr bool kStaged = STAGED;
static_assert(kIntegers || !kStaged, "integers alone are staged");
constexpr bool kRotates = AFTER == 1;
constexpr bool kGates = AFTER == 2;
constexpr int kThreads = kWarps * kLanes;
// Thread blocks of a multiprocessor at a time, where their registers suffice without spilling.
constexpr int kThreadBlocks = kWarps > 8 || kKind == 3 ? 1 : kLowBits + kHighBits <= 4 ? 3 : 2;
constexpr int kWidth = kRowTiles * kRows;
constexpr int kCluster = kGates && kIntegers ? 4 : 1;
static_assert(kThreads >= kTokens * kRows, "a thread finishes one row of one token");

// AFTER 1; see `rotate_and_store`. `bias` is AFTER 2's too.
struct Heads {
    const uint16_t* bias;
    const int64_t* positions;
    const uint16_t* cos;
    const uint16_t* sin;
    const int64_t* slots;
    int head_dim;
};

// The tile of rows that is a thread block's first, and how far its second lies from it.
__device__ __forceinline__ void find_row_tiles(int row_tiles, int head_dim, int& first,
                                               int& apart) {
    const int own = static_cast<int>(blockIdx.x);
    if constexpr (kRotates) {
        apart = head_dim / (2 * kRows);
        first = own / apart * (2 * apart) + own % apart;
    } else {
        apart = row_tiles / 2, first = own;
    }
}

__device__ __forceinline__ void load_tiles(const Weight& w, int first, int apart, int block,
                                           int lane, Tile (&tiles)[kRowTiles]) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) load_tile(w, first + r * apart, block, lane, tiles[r]);
}

// What a thread needs to finish its row of its token, read before the product ends.
struct Ending {
    float cos[2];
    float sin[2];
    float bias[2];
    int64_t slot;
};

__device__ __forceinline__ Ending prepare_ending(const Heads& heads, int row, int apart,
                                                 int token, int dim) {
    Ending ending{};
    if (heads.bias != nullptr) {
        ending.bias[0] = bfloat16_to_float(heads.bias[row]);
        ending.bias[1] = bfloat16_to_float(heads.bias[row + apart]);
    }
    if constexpr (kRotates) {
        ending.slot = heads.slots == nullptr ? -1 : heads.slots[token];
        const int64_t angle = heads.positions[token] * heads.head_dim + dim;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            ending.cos[i] = bfloat16_to_float(heads.cos[angle + i * apart]);
            ending.sin[i] = bfloat16_to_float(heads.sin[angle + i * apart]);
        }
    }
    return ending;
}

__device__ __forceinline__ void arrive_at_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Into the shared memory of the cluster's first thread block.
__device__ __forceinline__ void send_to_first(const float* at, float v) {
    asm volatile(
        "{\n.reg .u32 there;\n"
        "mapa.shared::cluster.u32 there, %0, 0;\n"
        "st.shared::cluster.f32 [there], %1;\n}" ::"r"(
            static_cast<uint32_t>(__cvta_generic_to_shared(at))),
        "f"(v)
        : "memory");
}

// Grid: row tiles / 2. At most 8 tokens. `out` is [tokens, rows] bfloat16, or with AFTER 2
// [tokens, rows / 2], in whose place integers take `out_codes`, `out_scales` and `out_sums`, as
// `quantize_tokens` writes them. With AFTER 1 rows are whole heads, whose dimension is a multiple
// of 32; with AFTER 2 half of them are a multiple of 64. For the rest see products.cu and
// `rotate_and_store`.
extern "C" __global__ void __cluster_dims__(kCluster, 1, 1)
    __launch_bounds__(kThreads, kThreadBlocks)
multiply_fused(const uint8_t* codes, const uint8_t* high, const uint8_t* scales,
               const uint8_t* mins, const uint8_t* values, const float* x_scales,
               const float* x_sums, uint16_t* out, int64_t blocks, int rows, int tokens,
               float unit, uint4 table_words, const uint16_t* bias, const int64_t* positions,
               const uint16_t* cos, const uint16_t* sin, const int64_t* slots, uint16_t* key_pool,
               uint16_t* value_pool, int num_heads, int num_kv_heads, int head_dim,
               uint8_t* out_codes, float* out_scales, float* out_sums) {
    extern __shared__ uint4 memory[];
    __shared__ float parts[kWarps][kTokens][kWidth + 1];
    __shared__ float gathered[kCluster > 1 ? kTokens : 1][kBlock];
    const Weight w{codes, high, scales, mins, blocks};
    const Table table{{table_words.x, table_words.y, table_words.z, table_words.w}};
    const Activations activations{values, x_scales, x_sums, tokens};
    const Heads heads{bias, positions, cos, sin, slots, head_dim};
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    let_next_begin();
    if constexpr (kCluster > 1) arrive_at_cluster();  // all have begun
    int first, apart;
    find_row_tiles(rows / kRows, head_dim, first, apart);
    // Two steps of reading are under way while one is multiplied; the first two begin before the
    // inputs are there.
    const int last = static_cast<int>(blocks) - 1;
    Tile now[kRowTiles], next[kRowTiles];
    load_tiles(w, first, apart, min(warp, last), lane, now);
    if (warp + kWarps <= last) load_tiles(w, first, apart, warp + kWarps, lane, next);
    const int token = threadIdx.x / kRows, column = threadIdx.x % kRows;
    const int row = first * kRows + column;
    const int dim = kRotates ? row % head_dim : 0;
    wait_for_inputs();
    Ending ending{};
    if (token < tokens) ending = prepare_ending(heads, row, apart * kRows, token, dim);
    Staged staged;
    if constexpr (kStaged) staged = stage(activations, last + 1, memory);
    float sums[kRowTiles][4] = {};
    for (int block = warp; block <= last; block += kWarps) {
        Fragments fragments;
        if constexpr (kStaged) {
            read_fragments(staged, block, lane, fragments);
        } else {
            load_fragments(activations, blocks, block, 0, lane, fragments);
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
            Operand operand;
            prepare(now[r], table, unit * kCodeUnit, operand);
            now[r] = next[r];
            multiply_tiles(operand, fragments, sums[r]);
        }
        const int ahead = block + 2 * kWarps;
        if (ahead <= last) load_tiles(w, first, apart, ahead, lane, next);
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            parts[warp][lane % 4 * 2 + (i & 1)][r * kRows + lane / 4 + (i >> 1) * 8] = sums[r][i];
        }
    }
    __syncthreads();
    float sum[kRowTiles];
    if (token < tokens) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
            sum[r] = 0;
#pragma unroll
            for (int k = 0; k < kWarps; ++k) sum[r] += parts[k][token][r * kRows + column];
            sum[r] = round_to_bfloat16(sum[r]);
            if (bias != nullptr) sum[r] = round_to_bfloat16(sum[r] + ending.bias[r]);
        }
    }
    if constexpr (kRotates) {
        if (token >= tokens) return;
        const int half = head_dim / 2;
        const int head = row / head_dim;
        const bool is_query = head < num_heads, is_value = head >= num_heads + num_kv_heads;
        uint16_t* to = out + static_cast<int64_t>(token) * rows + row - dim;
        if (!is_query && ending.slot >= 0) {
            const int kv_head = head - num_heads - (is_value ? num_kv_heads : 0);
            to = (is_value ? value_pool : key_pool) +
                 (ending.slot * num_kv_heads + kv_head) * head_dim;
        }
        const float a = sum[0], b = sum[1];
        if (!is_value) {
            sum[0] = rotate(a, -b, ending.cos[0], ending.sin[0]);
            sum[1] = rotate(b, a, ending.cos[1], ending.sin[1]);
        }
        to[dim] = float_to_bfloat16(sum[0]);
        to[dim + half] = float_to_bfloat16(sum[1]);
    } else if constexpr (!kIntegers) {
        if (token >= tokens) return;
        out[static_cast<int64_t>(token) * (rows / 2) + row] =
            float_to_bfloat16(multiply_gated(sum[0], sum[1]));
    } else {
        wait_for_cluster();
        if (token < tokens) {
            send_to_first(&gathered[token][blockIdx.x % kCluster * kRows + column],
                          multiply_gated(sum[0], sum[1]));
        }
        arrive_at_cluster();
        wait_for_cluster();
        const int place = threadIdx.x / 8, part = threadIdx.x % 8;
        if (blockIdx.x % kCluster || place >= tokens) return;
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = gathered[place][part * 8 + i];
        int8_t rounded[8];
        const Quantized to{out_codes, out_scales, out_sums, rows / 2 / kBlock};
        quantize_block(v, place, blockIdx.x / kCluster, part, to, rounded);
    }
}

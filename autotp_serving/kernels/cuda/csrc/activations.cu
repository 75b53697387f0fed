// What lies between the products of a layer but for norms: rotation, the gated activation, rounding
// to 8-bit integers where a product takes those. bfloat16 in and out, rounded where transformers'
// own code rounds. Grids have a token in x.
#include "common.cuh"
#include "quantize.cuh"

// x [tokens, columns] to integers, or to bfloat16 in one way. Grid y: 256 chunks of 8.
extern "C" __global__ void __launch_bounds__(256)
quantize_tokens(const uint16_t* x, int64_t columns, int64_t stride, uint8_t* codes, float* scales,
                float* sums, uint16_t* plain, int way) {
    const Quantized to{codes, scales, sums, columns / kBlock};
    const int64_t token = blockIdx.x;
    const int64_t chunk = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    let_next_begin();
    wait_for_inputs();
    if (chunk * 8 >= columns) return;  // whole groups of 8 lanes
    float v[8];
    unpack_bfloat16(*reinterpret_cast<const uint4*>(x + token * stride + chunk * 8), v);
    write_numbers(v, token, gridDim.x, chunk, columns, to, plain, way);
}

// gate_up [tokens, 2 * columns] (+ bias [2 * columns]): silu(gate) * up. Grid y: 256 chunks of 8.
extern "C" __global__ void __launch_bounds__(256)
silu_multiply(const uint16_t* gate_up, const uint16_t* bias, int64_t columns, uint8_t* codes,
              float* scales, float* sums, uint16_t* plain, int way) {
    const Quantized to{codes, scales, sums, columns / kBlock};
    const int64_t token = blockIdx.x;
    const int64_t chunk = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    let_next_begin();
    wait_for_inputs();
    if (chunk * 8 >= columns) return;  // whole groups of 8 lanes
    const uint4* gates = reinterpret_cast<const uint4*>(gate_up + token * 2 * columns);
    float gate[8], up[8];
    unpack_bfloat16(gates[chunk], gate);
    unpack_bfloat16(gates[columns / 8 + chunk], up);
    if (bias != nullptr) {
        float gate_bias[8], up_bias[8];
        unpack_bfloat16(reinterpret_cast<const uint4*>(bias)[chunk], gate_bias);
        unpack_bfloat16(reinterpret_cast<const uint4*>(bias)[columns / 8 + chunk], up_bias);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            gate[i] = round_to_bfloat16(gate[i] + gate_bias[i]);
            up[i] = round_to_bfloat16(up[i] + up_bias[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) gate[i] = multiply_gated(gate[i], up[i]);
    write_numbers(gate, token, gridDim.x, chunk, columns, to, plain, way);
}

__device__ __forceinline__ void read_pair(const uint16_t* from, float (&v)[2]) {
    const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
    v[0] = __uint_as_float(pair << 16), v[1] = __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ void add_pair(const uint16_t* from, float (&v)[2]) {
    float more[2];
    read_pair(from, more);
    v[0] = round_to_bfloat16(v[0] + more[0]), v[1] = round_to_bfloat16(v[1] + more[1]);
}
__device__ __forceinline__ void scale_pair(const uint16_t* weight, float factor, float (&v)[2]) {
    float w[2];
    read_pair(weight, w);
    v[0] = round_to_bfloat16(round_to_bfloat16(v[0] * factor) * w[0]);
    v[1] = round_to_bfloat16(round_to_bfloat16(v[1] * factor) * w[1]);
}

// Queries, keys and values [tokens, (heads + 2 * kv_heads) * head_dim]: bias, norm of heads (where
// there are any), rotation of queries and keys by row `positions[token]` of cos and sin
// [longest, head_dim]. Queries stay in place; keys and values go to their slots of the pools
// [slots, kv_heads, head_dim], or stay as well where those are null or the slot is -1. A warp takes
// 4 heads; grid y: all heads / 32. head_dim is a multiple of 4 and at most 256.
extern "C" __global__ void __launch_bounds__(256)
rotate_and_store(uint16_t* qkv, const uint16_t* bias, const uint16_t* query_norm,
                 const uint16_t* key_norm, float epsilon, const int64_t* positions,
                 const uint16_t* cos, const uint16_t* sin, const int64_t* slots, uint16_t* keys,
                 uint16_t* values, int heads, int kv_heads, int head_dim) {
    constexpr int kMost = 2;  // of two neighbouring pairs a lane
    constexpr int kHeads = 4;  // a warp, one after another: they share cos and sin
    const int64_t token = blockIdx.x;
    const int lane = threadIdx.x % kLanes;
    const int half = head_dim / 2, all_heads = heads + 2 * kv_heads;
    let_next_begin();
    float c[kMost][2][2], s[kMost][2][2];
    wait_for_inputs();
    const int64_t angle = positions[token] * head_dim;
    const int64_t slot = slots == nullptr ? -1 : slots[token];
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
        const int column = (lane + i * kLanes) * 2;
        if (column >= half) continue;
        read_pair(cos + angle + column, c[i][0]);
        read_pair(sin + angle + column, s[i][0]);
        read_pair(cos + angle + column + half, c[i][1]);
        read_pair(sin + angle + column + half, s[i][1]);
    }
#pragma unroll
    for (int turn = 0; turn < kHeads; ++turn) {
        const int head = (blockIdx.y * kHeads + turn) * 8 + threadIdx.x / kLanes;
        if (head >= all_heads) return;
        uint16_t* row = qkv + (token * all_heads + head) * head_dim;
        float low[kMost][2], high[kMost][2];
        float square = 0;
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const int column = (lane + i * kLanes) * 2;
            if (column >= half) continue;
            read_pair(row + column, low[i]);
            read_pair(row + column + half, high[i]);
            if (bias != nullptr) {
                add_pair(bias + head * head_dim + column, low[i]);
                add_pair(bias + head * head_dim + column + half, high[i]);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                square = fmaf(low[i][j], low[i][j], fmaf(high[i][j], high[i][j], square));
            }
        }
        const bool is_query = head < heads, is_value = head >= heads + kv_heads;
        const uint16_t* norm = is_value ? nullptr : is_query ? query_norm : key_norm;
        if (norm != nullptr) {
#pragma unroll
            for (int step = 16; step > 0; step /= 2) {
                square += __shfl_xor_sync(0xffffffffu, square, step);
            }
            const float mean = __fdiv_rn(square, static_cast<float>(head_dim));
            const float factor = __frsqrt_rn(mean + epsilon);
#pragma unroll
            for (int i = 0; i < kMost; ++i) {
                const int column = (lane + i * kLanes) * 2;
                if (column >= half) continue;
                scale_pair(norm + column, factor, low[i]);
                scale_pair(norm + column + half, factor, high[i]);
            }
        }
        uint16_t* to = row;
        if (!is_query && slot >= 0) {
            const int kv_head = head - heads - (is_value ? kv_heads : 0);
            to = (is_value ? values : keys) + (slot * kv_heads + kv_head) * head_dim;
        }
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const int column = (lane + i * kLanes) * 2;
            if (column >= half) continue;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float a = low[i][j], b = high[i][j];
                if (is_value) continue;
                low[i][j] = rotate(a, -b, c[i][0][j], s[i][0][j]);
                high[i][j] = rotate(b, a, c[i][1][j], s[i][1][j]);
            }
            *reinterpret_cast<uint32_t*>(to + column) = pair_bfloat16(low[i][0], low[i][1]);
            *reinterpret_cast<uint32_t*>(to + column + half) =
                pair_bfloat16(high[i][0], high[i][1]);
        }
    }
}

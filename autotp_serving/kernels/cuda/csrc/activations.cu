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

// Four neighbouring numbers of a row.
__device__ __forceinline__ void read_four(uint2 from, float (&v)[4]) {
    v[0] = __uint_as_float(from.x << 16), v[1] = __uint_as_float(from.x & 0xffff0000u);
    v[2] = __uint_as_float(from.y << 16), v[3] = __uint_as_float(from.y & 0xffff0000u);
}
__device__ __forceinline__ uint2 load_four(const uint16_t* from) {
    return *reinterpret_cast<const uint2*>(from);
}
__device__ __forceinline__ void add_four(const uint16_t* from, float (&v)[4]) {
    float more[4];
    read_four(load_four(from), more);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = round_to_bfloat16(v[i] + more[i]);
}
__device__ __forceinline__ void scale_four(const uint16_t* weight, float factor, float (&v)[4]) {
    float w[4];
    read_four(load_four(weight), w);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[i] = round_to_bfloat16(round_to_bfloat16(v[i] * factor) * w[i]);
    }
}

// Queries, keys and values [tokens, (heads + 2 * kv_heads) * head_dim]: bias, norm of heads (where
// there are any), rotation of queries and keys by row `positions[token]` of cos and sin
// [longest, head_dim]. Queries stay in place; keys and values go to their slots of the pools
// [slots, kv_heads, head_dim], or stay as well where those are null or the slot is -1. `span` lanes,
// a power of two, take a head, each four numbers of either half; a thread takes three heads, which it
// asks for together. head_dim is a multiple of 8 and at most 8 * span.
extern "C" __global__ void __launch_bounds__(256, 5)
rotate_and_store(uint16_t* qkv, const uint16_t* bias, const uint16_t* query_norm,
                 const uint16_t* key_norm, float epsilon, const int64_t* positions,
                 const uint16_t* cos, const uint16_t* sin, const int64_t* slots, uint16_t* keys,
                 uint16_t* values, int heads, int kv_heads, int head_dim, int span) {
    constexpr int kHeads = 3;
    const int64_t token = blockIdx.x;
    const int half = head_dim / 2, all_heads = heads + 2 * kv_heads;
    const int column = threadIdx.x % span * 4, beside = blockDim.x / span;
    const bool is_there = column < half;
    const int first_head = blockIdx.y * kHeads * beside + threadIdx.x / span;
    let_next_begin();
    wait_for_inputs();
    uint16_t* const rows = qkv + token * all_heads * head_dim + column;
    uint2 packed[kHeads][2] = {};
#pragma unroll
    for (int turn = 0; turn < kHeads; ++turn) {
        const int head = first_head + turn * beside;
        if (!is_there || head >= all_heads) continue;
        packed[turn][0] = load_four(rows + head * head_dim);
        packed[turn][1] = load_four(rows + head * head_dim + half);
    }
    const int64_t slot = slots == nullptr ? -1 : slots[token];
    uint2 cosines[2] = {}, sines[2] = {};
    if (is_there) {
        const int64_t angle = positions[token] * head_dim + column;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            cosines[i] = load_four(cos + angle + i * half);
            sines[i] = load_four(sin + angle + i * half);
        }
    }
#pragma unroll
    for (int turn = 0; turn < kHeads; ++turn) {
        const int head = first_head + turn * beside;
        if (head >= all_heads) return;  // all lanes of a head together
        float low[4], high[4];
        read_four(packed[turn][0], low);
        read_four(packed[turn][1], high);
        if (bias != nullptr && is_there) {
            add_four(bias + head * head_dim + column, low);
            add_four(bias + head * head_dim + column + half, high);
        }
        const bool is_query = head < heads, is_value = head >= heads + kv_heads;
        const uint16_t* norm = is_value ? nullptr : is_query ? query_norm : key_norm;
        if (norm != nullptr) {
            const uint32_t group =
                (0xffffffffu >> (kLanes - span)) << (threadIdx.x % kLanes / span * span);
            float square = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                square = fmaf(low[i], low[i], fmaf(high[i], high[i], square));
            }
            for (int step = span / 2; step > 0; step /= 2) {
                square += __shfl_xor_sync(group, square, step);
            }
            const float mean = __fdiv_rn(square, static_cast<float>(head_dim));
            const float factor = __frsqrt_rn(mean + epsilon);
            if (is_there) {
                scale_four(norm + column, factor, low);
                scale_four(norm + column + half, factor, high);
            }
        }
        if (!is_there) continue;
        uint16_t* to = rows + head * head_dim;
        if (!is_query && slot >= 0) {
            const int kv_head = head - heads - (is_value ? kv_heads : 0);
            to = (is_value ? values : keys) + (slot * kv_heads + kv_head) * head_dim + column;
        }
        if (!is_value) {
            float c[2][4], s[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                read_four(cosines[i], c[i]);
                read_four(sines[i], s[i]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float a = low[i], b = high[i];
                low[i] = rotate(a, -b, c[0][i], s[0][i]);
                high[i] = rotate(b, a, c[1][i], s[1][i]);
            }
        }
        *reinterpret_cast<uint2*>(to) =
            make_uint2(pair_bfloat16(low[0], low[1]), pair_bfloat16(low[2], low[3]));
        *reinterpret_cast<uint2*>(to + half) =
            make_uint2(pair_bfloat16(high[0], high[1]), pair_bfloat16(high[2], high[3]));
    }
}

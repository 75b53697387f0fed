// What lies between the products of a layer: norms, rotation, the gated activation, and rounding
// to 8-bit integers where a product takes those. bfloat16 in and out, rounded where transformers'
// own code rounds. Grids have a token in x.
#include "common.cuh"

// Where quantized activations of a row go; `codes` null: they stay bfloat16.
struct Quantized {
    uint8_t* codes;
    float* scales;
    float* sums;
    int64_t blocks;
};

// Rounds the 64 numbers that 8 neighbouring lanes hold, 8 each, by the rule of the CPU's kernels:
// a scale of largest magnitude / 127, halves to even. Tiles of 8 tokens by 64, and within a token's
// 64 bytes column h * 32 + t * 8 + i lies at t * 16 + h * 8 + i: as products.cu reads them.
//
// A block with infinity or NaN gives NaN, one whose numbers are all below 2**-119 zeros.
__device__ __forceinline__ float quantize_block(const float (&v)[8], int64_t token, int64_t block,
                                                int part, const Quantized& to, int8_t (&codes)[8]) {
    const uint32_t group = 0xffu << (threadIdx.x % kLanes / 8 * 8);  // others may have left
    uint32_t largest = 0;  // as integers, magnitudes keep their order and NaN is the largest
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = max(largest, __float_as_uint(v[i]) & 0x7fffffffu);
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
        largest = max(largest, __shfl_xor_sync(group, largest, step));
    }
    const float peak = __uint_as_float(largest);
    const bool finite = largest < 0x7f800000u, tiny = peak < 0x1p-119f;
    const float scale = tiny ? 0.0f : finite ? __fdiv_rn(peak, 127.0f) : __int_as_float(0x7fc00000);
    const float inverse = tiny || !finite ? 0.0f : __fdiv_rn(127.0f, peak);
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        codes[i] = finite ? static_cast<int8_t>(__float2int_rn(__fmul_rn(v[i], inverse))) : 0;
        sum += codes[i];
    }
    if (to.codes != nullptr) {
        const int64_t index = token / kTokens * to.blocks + block;
        const int row = static_cast<int>(token % kTokens);
        uint8_t* bytes = to.codes + index * (kTokens * kBlock) + row * kBlock + part % 4 * 16 +
                         part / 4 * 8;
        uint2 packed;
        packed.x = (codes[0] & 0xff) | (codes[1] & 0xff) << 8 | (codes[2] & 0xff) << 16 |
                   static_cast<uint32_t>(codes[3] & 0xff) << 24;
        packed.y = (codes[4] & 0xff) | (codes[5] & 0xff) << 8 | (codes[6] & 0xff) << 16 |
                   static_cast<uint32_t>(codes[7] & 0xff) << 24;
        *reinterpret_cast<uint2*>(bytes) = packed;
#pragma unroll
        for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(group, sum, step);
        if (part == 0) {
            to.scales[index * kTokens + row] = scale;
            to.sums[index * kTokens + row] = scale * static_cast<float>(sum);
        }
    }
    return scale;
}

// How numbers that are not rounded to integers are written.
constexpr int kRounded = 1;  // as what the integers stand for: products of many tokens see the same
constexpr int kWide = 2;     // for wide_products.cu

// Writes 8 numbers of a row for wide_products.cu: [block][token][64], tokens in whole tiles of 8.
// Of column h * 32 + t * 8 + q * 4 + 2 * e + o, h * 2 + q is the step of 16 that the tensor cores
// take, and o * 8 + 2 * t + e its place there. Pieces of 16 bytes are swizzled by the token.
__device__ __forceinline__ void write_wide(const float (&v)[8], int64_t token, int64_t chunk,
                                           uint16_t* to) {
    const int64_t padded = (gridDim.x + kTokens - 1) / kTokens * kTokens;
    const int part = static_cast<int>(chunk % 8), swizzle = static_cast<int>(token % 8);
    to += (chunk / 8 * padded + token) * kBlock + part % 4 * 2;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
        for (int o = 0; o < 2; ++o) {
            const int piece = (part / 4 * 2 + q) * 2 + o;
            *reinterpret_cast<uint32_t*>(to + (piece ^ swizzle) * 8) =
                pair_bfloat16(v[q * 4 + o], v[q * 4 + 2 + o]);
        }
    }
}

// Writes 8 numbers of a row: rounded to integers, or as bfloat16 in one of the ways above.
__device__ __forceinline__ void write_numbers(float (&v)[8], int64_t token, int64_t chunk,
                                              int64_t columns, const Quantized& to, uint16_t* plain,
                                              int way) {
    if (way == kWide) {
        write_wide(v, token, chunk, plain);
        return;
    }
    if (to.codes != nullptr || way == kRounded) {
        int8_t codes[8];
        const int part = static_cast<int>(chunk % 8);
        const float scale = quantize_block(v, token, chunk / 8, part, to, codes);
        if (to.codes != nullptr) return;
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = scale * static_cast<float>(codes[i]);
    }
    *reinterpret_cast<uint4*>(plain + token * columns + chunk * 8) = pack_bfloat16(v);
}

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
    write_numbers(v, token, chunk, columns, to, plain, way);
}

// hidden += added (where there is any); out = norm of hidden, times weight. One thread block a
// token; `columns` is a multiple of 64. Shared memory: columns * 2 bytes.
extern "C" __global__ void __launch_bounds__(1024)
add_rms_norm(uint16_t* hidden, const uint16_t* added, const uint16_t* weight, float epsilon,
             int64_t columns, uint8_t* codes, float* scales, float* sums, uint16_t* plain,
             int way) {
    extern __shared__ uint4 row[];
    __shared__ float parts[32];
    const Quantized to{codes, scales, sums, columns / kBlock};
    const int64_t token = blockIdx.x, chunks = columns / 8;
    uint4* from = reinterpret_cast<uint4*>(hidden + token * columns);
    let_next_begin();
    wait_for_inputs();
    float square = 0;
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
        uint4 packed = from[chunk];
        float v[8];
        unpack_bfloat16(packed, v);
        if (added != nullptr) {
            float more[8];
            unpack_bfloat16(reinterpret_cast<const uint4*>(added + token * columns)[chunk], more);
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] += more[i];
            packed = pack_bfloat16(v);
            from[chunk] = packed;
            unpack_bfloat16(packed, v);
        }
        row[chunk] = packed;
#pragma unroll
        for (int i = 0; i < 8; ++i) square = fmaf(v[i], v[i], square);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
    if (threadIdx.x % kLanes == 0) parts[threadIdx.x / kLanes] = square;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x) / kLanes; ++i) total += parts[i];
    const float factor = __frsqrt_rn(__fdiv_rn(total, static_cast<float>(columns)) + epsilon);
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
        float v[8], w[8];
        unpack_bfloat16(row[chunk], v);
        unpack_bfloat16(reinterpret_cast<const uint4*>(weight)[chunk], w);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            v[i] = round_to_bfloat16(round_to_bfloat16(v[i] * factor) * w[i]);
        }
        write_numbers(v, token, chunk, columns, to, plain, way);
    }
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
    for (int i = 0; i < 8; ++i) {
        const float silu = round_to_bfloat16(gate[i] / (1.0f + expf(-gate[i])));
        gate[i] = round_to_bfloat16(silu * up[i]);
    }
    write_numbers(gate, token, chunk, columns, to, plain, way);
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
                low[i][j] = round_to_bfloat16(a * c[i][0][j]) + round_to_bfloat16(-b * s[i][0][j]);
                high[i][j] = round_to_bfloat16(b * c[i][1][j]) + round_to_bfloat16(a * s[i][1][j]);
            }
            *reinterpret_cast<uint32_t*>(to + column) = pair_bfloat16(low[i][0], low[i][1]);
            *reinterpret_cast<uint32_t*>(to + column + half) =
                pair_bfloat16(high[i][0], high[i][1]);
        }
    }
}

// A tile of weights times a tile of 8 tokens whose activations a lane holds; after weights.cuh.
#pragma once

// Activations: integers as `quantize_tokens` writes them, or bfloat16 in plain rows.
struct Activations {
    const uint8_t* values;
    const float* scales;
    const float* sums;
    int tokens;
};

// A lane's part of one block of 64 columns: 16 bytes of integers or two halves of bfloat16, and of
// the two tokens whose sums it keeps, what a code is worth and the block's sum.
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

// Integer activations of one tile of tokens in shared memory, so that a warp does not wait for the
// caches at each of its blocks of columns: [block][token][64], and of each block 8 scales and sums.
struct Staged {
    uint8_t* values;
    float* scales;
    float* sums;
    int tokens;
};

__device__ __forceinline__ void begin_copy(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(from)
                 : "memory");
}

// Copies them, all threads together.
__device__ __forceinline__ Staged stage(const Activations& x, int blocks, uint4* memory) {
    constexpr int kPieces = kTokens * kBlock / 16;  // of a block, as it lies in memory
    uint8_t* values = reinterpret_cast<uint8_t*>(memory);
    float* scales = reinterpret_cast<float*>(values + blocks * x.tokens * kBlock);
    const Staged to{values, scales, scales + blocks * kTokens, x.tokens};
    const int pieces = x.tokens * kBlock / 16;
    for (int i = threadIdx.x; i < blocks * pieces; i += blockDim.x) {
        begin_copy(values + i * 16, x.values + (i / pieces * kPieces + i % pieces) * 16);
    }
    for (int i = threadIdx.x; i < blocks * kTokens / 4; i += blockDim.x) {
        begin_copy(to.scales + i * 4, x.scales + i * 4);
        if constexpr (kMins) begin_copy(to.sums + i * 4, x.sums + i * 4);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    return to;
}

__device__ __forceinline__ void read_fragments(const Staged& x, int block, int lane,
                                               Fragments& to) {
    to.words[0] = make_uint4(0, 0, 0, 0);
    if (lane / 4 < x.tokens) {
        to.words[0] =
            *reinterpret_cast<const uint4*>(x.values + block * x.tokens * kBlock + lane * 16);
    }
    const int place = block * kTokens + lane % 4 * 2;
    to.scale = *reinterpret_cast<const float2*>(x.scales + place);
    if constexpr (kMins) to.sum = *reinterpret_cast<const float2*>(x.sums + place);
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
        multiply_floats(a, x.words[0], x.words[1], sums);
    }
}

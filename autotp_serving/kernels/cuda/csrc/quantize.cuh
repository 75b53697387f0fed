// Rounding of activations to 8-bit integers where they are made. Include common.cuh before.
#pragma once

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

// How bfloat16 is written, bit by bit.
constexpr int kRounded = 1;  // as what the integers stand for: products of many tokens see the same
constexpr int kWide = 2;     // for wide_products.cu

// Writes 8 numbers of a row for wide_products.cu: [block][token][64], tokens in whole tiles of 8.
// Of column h * 32 + t * 8 + q * 4 + 2 * e + o, h * 2 + q is the step of 16 that the tensor cores
// take, and o * 8 + 2 * t + e its place there. Pieces of 16 bytes are swizzled by the token. Four
// lanes give each other words, so that each writes a piece.
__device__ __forceinline__ void write_wide(const float (&v)[8], int64_t token, int64_t tokens,
                                           int64_t chunk, uint16_t* to) {
    const int64_t padded = (tokens + kTokens - 1) / kTokens * kTokens;
    const int part = static_cast<int>(chunk % 8), swizzle = static_cast<int>(token % 8);
    const uint32_t group = 0xffu << (threadIdx.x % kLanes / 8 * 8);  // others may have left
    uint32_t words[4];  // [q * 2 + o] of this lane's t; then [t] of this lane's q * 2 + o
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int first = i / 2 * 4 + i % 2;
        words[i] = pair_bfloat16(v[first], v[first + 2]);
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool is_upper = part & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & step) continue;
            const uint32_t theirs =
                __shfl_xor_sync(group, is_upper ? words[i] : words[i + step], step);
            if (is_upper) words[i] = theirs;
            if (!is_upper) words[i + step] = theirs;
        }
    }
    to += (chunk / 8 * padded + token) * kBlock + (part ^ swizzle) * 8;
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Writes 8 numbers of a row: rounded to integers, or as bfloat16 in one of the ways above.
__device__ __forceinline__ void write_numbers(float (&v)[8], int64_t token, int64_t tokens,
                                              int64_t chunk, int64_t columns, const Quantized& to,
                                              uint16_t* plain, int way) {
    if (to.codes != nullptr || way & kRounded) {
        int8_t codes[8];
        const int part = static_cast<int>(chunk % 8);
        const float scale = quantize_block(v, token, chunk / 8, part, to, codes);
        if (to.codes != nullptr) return;
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = scale * static_cast<float>(codes[i]);
    }
    if (way & kWide) {
        write_wide(v, token, tokens, chunk, plain);
        return;
    }
    *reinterpret_cast<uint4*>(plain + token * columns + chunk * 8) = pack_bfloat16(v);
}

// Shared by the CUDA kernels: small vectors, bfloat16, loads past the cache, launch overlap.
//
// Compiled by NVRTC without CUDA's headers, so that no toolkit is needed: what the kernels take
// from them is a few lines of PTX.
#pragma once

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef signed char int8_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned long uint64_t;

constexpr int kBlock = 64;  // weights, or activations, that share a scale
constexpr int kLanes = 32;
constexpr int kRows = 16;   // rows of a weight's tile
constexpr int kTokens = 8;  // tokens of an activation tile

// Waits for the kernels before this one: what they wrote is visible afterwards. Until then only
// weights may be read.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel begin as far as its own `wait_for_inputs`.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Weights are read once: they must not push activations out of the cache.
__device__ __forceinline__ uint4 load_once(const void* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}
__device__ __forceinline__ uint2 load_once8(const void* from) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(from));
    return v;
}
__device__ __forceinline__ uint32_t load_once4(const void* from) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}
__device__ __forceinline__ float bfloat16_to_float(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
__device__ __forceinline__ uint16_t float_to_bfloat16(float v) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}
__device__ __forceinline__ float round_to_bfloat16(float v) {
    return bfloat16_to_float(float_to_bfloat16(v));
}
__device__ __forceinline__ uint32_t pair_bfloat16(float low, float high) {
    uint32_t v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
__device__ __forceinline__ void unpack_bfloat16(uint4 from, float* to) {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ uint4 pack_bfloat16(const float* from) {
    return make_uint4(pair_bfloat16(from[0], from[1]), pair_bfloat16(from[2], from[3]),
                      pair_bfloat16(from[4], from[5]), pair_bfloat16(from[6], from[7]));
}

// silu(gate) * up, rounded where transformers' own code rounds. The quick division and power of two
// err by a few units of float32's last place, which bfloat16 seldom shows.
__device__ __forceinline__ float multiply_gated(float gate, float up) {
    const float silu = round_to_bfloat16(__fdividef(gate, 1.0f + __expf(-gate)));
    return round_to_bfloat16(silu * up);
}

// One number of a rotated pair, still to be rounded.
__device__ __forceinline__ float rotate(float own, float other, float cosine, float sine) {
    return round_to_bfloat16(own * cosine) + round_to_bfloat16(other * sine);
}

// sums[16 x 8] += a[16 x 32] * b[32 x 8] in 8-bit integers.
template <bool kUnsigned>
__device__ __forceinline__ void multiply_bytes(int32_t (&c)[4], const uint32_t (&a)[4],
                                               uint32_t b0, uint32_t b1) {
    if constexpr (kUnsigned) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// sums[16 x 8] += a[16 x 16] * b[16 x 8] in bfloat16.
__device__ __forceinline__ void multiply_pairs(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A sum and the RMS norm of it: what is added comes from this card alone, or, where RANKS are
// several, each card has a part of it and gets the others' in the same kernel.
//
// A card pushes its parts straight into the others' inboxes and then waits for its own to fill: one
// way over the link and no signal. Words that have not arrived yet are kEmpty, a pair of NaN that no
// part holds, so each of them says for itself whether it is there; whoever has read them makes them
// kEmpty again. An inbox has room for two turns of a row. A card pushes turn n + 2 after it has read
// turn n + 1, which its peer pushed after a kernel in which it emptied turn n: nothing is ever
// overwritten. Turns are counted on the card, a row at a time, so that graphs can be replayed.
#include "common.cuh"
#include "quantize.cuh"

constexpr int kRanks = RANKS;
constexpr uint32_t kEmpty = 0xffffffffu, kOtherNans = 0x7fff7fffu;

// Past the first-level cache, to and from memory that other cards see.
__device__ __forceinline__ uint4 load_shared(const uint4* from) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}
__device__ __forceinline__ void store_shared(uint4* to, uint4 v) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
__device__ __forceinline__ uint32_t load_turn(const uint32_t* from) {
    uint32_t turn;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(turn) : "l"(from) : "memory");
    return turn;
}

__device__ __forceinline__ bool has_arrived(uint4 v) {
    return v.x != kEmpty && v.y != kEmpty && v.z != kEmpty && v.w != kEmpty;
}
__device__ __forceinline__ uint32_t fill(uint32_t word) {
    return word == kEmpty ? kOtherNans : word;
}

// The others' inboxes as this card reaches them, and its own: uint4 [2 turns, sender, rows, chunks].
struct Addresses {
    int64_t ranks[kRanks];
};
struct Inbox {
    uint4* own;
    int rank;
    int64_t rows;
    int64_t chunks;

    __device__ __forceinline__ int64_t find(int sender, uint32_t turn, int64_t row) const {
        return ((turn * kRanks + sender) * rows + row) * chunks;
    }
};

// 8 numbers of a row, summed in the order of the ranks, so that all have the same bits.
__device__ __forceinline__ void take_sum(const Inbox& inbox, uint4 mine, uint32_t turn,
                                         int64_t row, int64_t chunk, float (&sum)[8]) {
    uint4 parts[kRanks];
    bool is_complete;
    do {
        is_complete = true;
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
            if (r == inbox.rank) continue;
            parts[r] = load_shared(inbox.own + inbox.find(r, turn, row) + chunk);
            is_complete = is_complete && has_arrived(parts[r]);
        }
    } while (!is_complete);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = 0;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
        float part[8];
        unpack_bfloat16(r == inbox.rank ? mine : parts[r], part);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] += part[i];
        if (r == inbox.rank) continue;
        store_shared(inbox.own + inbox.find(r, turn, row) + chunk,
                     make_uint4(kEmpty, kEmpty, kEmpty, kEmpty));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = round_to_bfloat16(sum[i]);
}

// hidden += added + bias (where there are any); out = norm of hidden, times weight. A thread block
// takes a token, then the one `gridDim.x` further on; with several ranks all thread blocks must run
// at once. `columns` is a multiple of 64. Shared memory: columns * 2 bytes.
extern "C" __global__ void __launch_bounds__(1024)
add_rms_norm(uint16_t* hidden, const uint16_t* added, const uint16_t* bias, const uint16_t* weight,
             float epsilon, int64_t columns, int tokens, uint8_t* codes, float* scales, float* sums,
             uint16_t* plain, int way, uint4* inbox_of_rank, uint32_t* turns, int rank,
             int64_t rows, const Addresses addresses) {
    extern __shared__ uint4 row[];
    __shared__ float parts[32];
    const Quantized to{codes, scales, sums, columns / kBlock};
    const int64_t chunks = columns / 8;
    const Inbox inbox{inbox_of_rank, rank, rows, chunks};
    let_next_begin();
    uint4 first_weights = make_uint4(0, 0, 0, 0);  // seldom in the cache
    if (threadIdx.x < chunks) first_weights = reinterpret_cast<const uint4*>(weight)[threadIdx.x];
    wait_for_inputs();
    if constexpr (kRanks > 1) {
        for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
            const uint4* from = reinterpret_cast<const uint4*>(added) + token * chunks;
            const uint32_t turn = load_turn(turns + token);
            for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
                uint4 mine = from[chunk];
                mine = make_uint4(fill(mine.x), fill(mine.y), fill(mine.z), fill(mine.w));
#pragma unroll
                for (int r = 0; r < kRanks; ++r) {
                    if (r == rank) continue;
                    uint4* theirs = reinterpret_cast<uint4*>(addresses.ranks[r]);
                    store_shared(theirs + inbox.find(rank, turn, token) + chunk, mine);
                }
            }
        }
    }
    for (int64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
        uint4* from = reinterpret_cast<uint4*>(hidden) + token * chunks;
        uint32_t turn = 0;
        if constexpr (kRanks > 1) turn = load_turn(turns + token);
        float square = 0;
        for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
            uint4 packed = from[chunk];
            float v[8];
            unpack_bfloat16(packed, v);
            if (added != nullptr) {
                const uint4 mine =
                    reinterpret_cast<const uint4*>(added)[token * chunks + chunk];
                float more[8];
                if constexpr (kRanks > 1) {
                    take_sum(inbox, mine, turn, token, chunk, more);
                } else {
                    unpack_bfloat16(mine, more);
                }
                if (bias != nullptr) {
                    float b[8];
                    unpack_bfloat16(reinterpret_cast<const uint4*>(bias)[chunk], b);
#pragma unroll
                    for (int i = 0; i < 8; ++i) more[i] = round_to_bfloat16(more[i] + b[i]);
                }
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
        for (int step = 16; step > 0; step /= 2) {
            square += __shfl_xor_sync(0xffffffffu, square, step);
        }
        if (threadIdx.x % kLanes == 0) parts[threadIdx.x / kLanes] = square;
        __syncthreads();
        if constexpr (kRanks > 1) {
            if (threadIdx.x == 0) turns[token] = turn ^ 1;
        }
        float total = 0;
        for (int i = 0; i < static_cast<int>(blockDim.x) / kLanes; ++i) total += parts[i];
        const float factor = __frsqrt_rn(__fdiv_rn(total, static_cast<float>(columns)) + epsilon);
        for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
            float v[8], w[8];
            unpack_bfloat16(row[chunk], v);
            unpack_bfloat16(chunk == threadIdx.x ? first_weights
                                                 : reinterpret_cast<const uint4*>(weight)[chunk],
                            w);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                v[i] = round_to_bfloat16(round_to_bfloat16(v[i] * factor) * w[i]);
            }
            write_numbers(v, token, tokens, chunk, columns, to, plain, way);
        }
        __syncthreads();  // `parts` is written anew
    }
}

// Which expert multiplies which tokens: pairs of a token and one of its experts, sorted by expert.
#include "common.cuh"

constexpr int kThreads = 1024;

// Sums over the threads before this one, of a block of 1,024.
__device__ __forceinline__ int sum_before(int value, int* warp_sums) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    int sum = value;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();
    if (lane == kLanes - 1) warp_sums[warp] = sum;
    __syncthreads();
    int before = 0;
    for (int i = 0; i < warp; ++i) before += warp_sums[i];
    return before + sum - value;
}

// chosen [num_pairs]: the expert of each pair, of at most 1,024. `pairs` [num_pairs] are their
// numbers, sorted by expert; `groups` [num_groups] {expert, first, how many, 0} are of at most
// `most` pairs of one expert, the last ones empty. One thread block. Within an expert the order is
// that of arrival: a pair's product does not depend on its neighbours.
extern "C" __global__ void __launch_bounds__(kThreads)
group_pairs(const int64_t* chosen, int num_pairs, int most, int* pairs, uint4* groups,
            int num_groups) {
    __shared__ int counts[kThreads], places[kThreads], warp_sums[kThreads / kLanes], num_used;
    const int expert = static_cast<int>(threadIdx.x);
    counts[expert] = 0;
    let_next_begin();
    wait_for_inputs();
    __syncthreads();
    for (int pair = threadIdx.x; pair < num_pairs; pair += kThreads) {
        atomicAdd(&counts[chosen[pair]], 1);
    }
    __syncthreads();
    const int count = counts[expert], num_own = (count + most - 1) / most;
    const int first = sum_before(count, warp_sums);
    const int first_group = sum_before(num_own, warp_sums);
    places[expert] = first;
    for (int i = 0; i < num_own; ++i) {
        groups[first_group + i] = make_uint4(expert, first + i * most, min(most, count - i * most), 0);
    }
    if (expert == kThreads - 1) num_used = first_group + num_own;
    __syncthreads();
    for (int pair = threadIdx.x; pair < num_pairs; pair += kThreads) {
        pairs[atomicAdd(&places[chosen[pair]], 1)] = pair;
    }
    for (int i = num_used + threadIdx.x; i < num_groups; i += kThreads) {
        groups[i] = make_uint4(0, 0, 0, 0);
    }
}

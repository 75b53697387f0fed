// Reads memory from front to back in `threads` threads, as fast as it comes. No rank.
#include <omp.h>

#include <cstdint>

#if defined(__AVX512F__)
typedef uint64_t Vector __attribute__((vector_size(64)));
#else
typedef uint64_t Vector __attribute__((vector_size(32)));
#endif

extern "C" uint64_t read_memory(const Vector* memory, int64_t bytes, int threads) {
    const int64_t count = bytes / static_cast<int64_t>(sizeof(Vector));
    uint64_t total = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+ : total)
    for (int thread = 0; thread < threads; ++thread) {
        Vector sums[4] = {};
        const int64_t stop = count * (thread + 1) / threads;
        int64_t i = count * thread / threads;
        for (; i + 4 <= stop; i += 4) {
            for (int j = 0; j < 4; ++j) sums[j] += memory[i + j];
        }
        for (; i < stop; ++i) sums[0] += memory[i];
        const Vector sum = sums[0] + sums[1] + sums[2] + sums[3];
        for (unsigned j = 0; j < sizeof(Vector) / 8; ++j) total += sum[j];
    }
    return total;
}

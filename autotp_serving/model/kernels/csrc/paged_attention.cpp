// Attention over pages of bfloat16 keys and values, without gathering them: decodes and chunks of
// prompts alike.
//
// Runs on every rank, in the thread that calls and in the OpenMP threads it shares with torch.
// The unit of work is one sequence, one key/value head and some of its query tokens; their query
// heads that share the key/value head are the rows of a small product. The context is walked in
// blocks of 64 positions, which lie in the order that the products take, with a running maximum and
// sum per row. A row's result depends on its own context only: neither on the threads, nor on the
// batch, nor on how the prompt was cut into chunks.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include ISA_VECTORS

#include "bfloat16.h"
#include "exponential.h"
#include "kv_layout.h"
#include "paged_attention.h"

namespace {

constexpr int kPositions = 64;
constexpr int kLanes = 16;
constexpr int kVectors = kPositions / kLanes;
// Rows multiplied at a time: enough sums in flight to hide the products' latency.
constexpr int kRowsAtOnce = 4;
// Rows of a unit of work: their sums stay in the L2 cache.
constexpr int64_t kRowsPerTask = 128;
// Below any logit, yet finite, so that a row that has seen nothing yet stays a number.
constexpr float kNothing = -1e30f;

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// Memory of this thread, kept between calls; cut into parts by `take`.
class Scratch {
  public:
    void start(size_t bytes) {
        static thread_local std::unique_ptr<char, Free> memory;
        static thread_local size_t size = 0;
        if (bytes > size) {
            memory.reset();
            memory.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
            if (!memory) throw std::bad_alloc();
            size = bytes;
        }
        next_ = memory.get();
    }
    template <class T>
    T* take(size_t count) {
        T* part = reinterpret_cast<T*>(next_);
        next_ += (count * sizeof(T) + 63) / 64 * 64;
        return part;
    }

  private:
    char* next_ = nullptr;
};

struct Task {
    int64_t sequence, kv_head, first_token, stop_token;
};

// What a thread needs for its task.
struct Work {
    float* sums;       // [rows, value_dim]
    float* peaks;      // [rows], largest logit so far
    float* totals;     // [rows, 16], sum of weights so far, by lane
    uint32_t* partial;  // [8, value_dim], the values of a group that the context ends in
    uint32_t* zeros;    // [8, value_dim], for groups beyond the context
};

// softcap * tanh(x / softcap), by way of 2**-|..| so that nothing overflows.
inline Floats cap(Floats x, float softcap) {
    const Floats magnitude = larger(x, multiply(x, same_float(-1)));
    const Floats small =
        power_of_two(multiply(magnitude, same_float(-2.0f * kLog2e / softcap)));
    const Floats tanh = divide(subtract(same_float(1), small), add(same_float(1), small));
    return multiply(copy_sign(tanh, x), same_float(softcap));
}

// Where the keys and values of a block of positions lie, a group of 16 each.
struct Block {
    const uint32_t* keys[kVectors];
    const uint32_t* values[kVectors];
};

// Finds the block from position `start` on. Beyond `stop`, the context's end, keys are whatever
// lies there, since their logits are masked, but values are zeros: what others left behind may be
// NaN, which no weight of zero takes away.
inline void find_block(const AutotpAttention& call, const Task& task, int64_t start, int64_t stop,
                       const Work& work, Block& block) {
    const int32_t* table = call.tables + task.sequence * call.table_stride;
    for (int v = 0; v < kVectors; ++v) {
        const int64_t position = std::min(start + v * kLanes, (stop - 1) / kLanes * kLanes);
        const int64_t slot = table[position / call.block_size] * call.block_size +
                             position % call.block_size;
        const auto find = [&](const uint16_t* pool, int64_t size) {
            return reinterpret_cast<const uint32_t*>(
                pool + find_head(slot / kGroupSlots, task.kv_head, call.kv_heads, size));
        };
        block.keys[v] = find(call.keys, call.head_dim);
        block.values[v] = find(call.values, call.value_dim);
        const int64_t left = stop - (start + v * kLanes);
        if (left <= 0) {
            block.values[v] = work.zeros;
        } else if (left < kLanes) {
            for (int64_t pair = 0; pair < kLanes / 2; ++pair) {
                const uint32_t kept = 2 * pair + 1 < left ? ~0u : 2 * pair < left ? 0xffffu : 0u;
                for (int64_t col = 0; col < call.value_dim; ++col) {
                    const int64_t at = pair * call.value_dim + col;
                    work.partial[at] = block.values[v][at] & kept;
                }
            }
            block.values[v] = work.partial;
        }
    }
}

// Asks for a block.
inline void prefetch_block(const AutotpAttention& call, const Block& block) {
    for (int v = 0; v < kVectors; ++v) {
        for (int64_t line = 0; line < call.head_dim / 2; ++line) {
            prefetch_near(block.keys[v] + line * kLanes);
        }
        for (int64_t line = 0; line < call.value_dim / 2; ++line) {
            prefetch_near(block.values[v] + line * kLanes);
        }
    }
}

// A row of queries of a task.
struct Row {
    const uint16_t* query;
    int64_t position;
    int64_t index;  // among the task's rows
};

// Logits of `kCount` rows for the first `kVecs` vectors of a block of positions.
template <int kCount, int kVecs>
inline void find_logits(const AutotpAttention& call, const Row* rows, const Block& block,
                        Floats (*to)[kVecs]) {
    Floats logits[kCount][kVecs];
    for (int r = 0; r < kCount; ++r) {
        for (int v = 0; v < kVecs; ++v) logits[r][v] = same_float(0);
    }
    for (int64_t word = 0; word < call.head_dim / 2; ++word) {
        Bytes keys[kVecs];
        for (int v = 0; v < kVecs; ++v) {
            keys[v] = load_bytes(block.keys[v] + word * kLanes);
        }
        for (int r = 0; r < kCount; ++r) {
            const int32_t query = load_int32(rows[r].query + 2 * word);
            for (int v = 0; v < kVecs; ++v) {
                logits[r][v] = dot_pairs(logits[r][v], keys[v], query);
            }
        }
    }
    for (int r = 0; r < kCount; ++r) {
        for (int v = 0; v < kVecs; ++v) to[r][v] = logits[r][v];
    }
}

// Turns a row's logits into weights, as bfloat16. Where a logit is above all before, what has been
// summed so far shrinks.
template <int kVecs>
inline void find_weights(const AutotpAttention& call, const Row& row, int64_t start,
                         const Work& work, Floats* logits, uint16_t* weights) {
    const int64_t first = call.window ? row.position - call.window + 1 : 0;
    const int from = static_cast<int>(std::clamp<int64_t>(first - start, 0, kPositions));
    const int to =
        static_cast<int>(std::clamp<int64_t>(row.position + 1 - start, 0, kPositions));
    Floats peaks = same_float(kNothing);
    for (int v = 0; v < kVecs; ++v) {
        if (call.softcap != 0) {
            logits[v] = cap(multiply(logits[v], same_float(call.scaling)), call.softcap);
            logits[v] = multiply(logits[v], same_float(kLog2e));
        } else {
            logits[v] = multiply(logits[v], same_float(call.scaling * kLog2e));
        }
        if (from > 0 || to < kVecs * kLanes) {
            logits[v] = keep_lanes(logits[v], from - v * kLanes, to - v * kLanes);
        }
        peaks = larger(logits[v], peaks);
    }
    float peak = work.peaks[row.index];
    float* totals = work.totals + row.index * kLanes;
    Floats total = load_floats(totals);
    if (any_above(peaks, same_float(peak))) {
        const float before = peak;
        peak = largest_lane(peaks);
        work.peaks[row.index] = peak;
        const Floats shrink = same_float(first_lane(power_of_two(same_float(before - peak))));
        total = multiply(total, shrink);
        float* sums = work.sums + row.index * call.value_dim;
        for (int64_t col = 0; col < call.value_dim; col += kLanes) {
            store_floats(sums + col, multiply(load_floats(sums + col), shrink), kLanes);
        }
    }
    for (int v = 0; v < kVecs; ++v) {
        const Floats weight = power_of_two(subtract(logits[v], same_float(peak)));
        total = add(total, weight);
        store_bfloat16(weights + v * kLanes, weight, kLanes);
    }
    store_floats(totals, total, kLanes);
}

// Adds weights times values to the sums of `kCount` rows, for `kCols` vectors of columns.
template <int kCount, int kVecs, int kCols>
inline void add_columns(const AutotpAttention& call, const Row* rows, const Block& block,
                        const Work& work, const uint16_t (*weights)[kVecs * kLanes], int64_t col) {
    Floats sums[kCount][kCols];
    for (int r = 0; r < kCount; ++r) {
        const float* from = work.sums + rows[r].index * call.value_dim + col;
        for (int c = 0; c < kCols; ++c) sums[r][c] = load_floats(from + c * kLanes);
    }
    for (int v = 0; v < kVecs; ++v) {
        const uint32_t* from = block.values[v] + col;
        for (int pair = 0; pair < kLanes / 2; ++pair, from += call.value_dim) {
            Bytes values[kCols];
            for (int c = 0; c < kCols; ++c) values[c] = load_bytes(from + c * kLanes);
            for (int r = 0; r < kCount; ++r) {
                const int32_t weight = load_int32(weights[r] + v * kLanes + 2 * pair);
                for (int c = 0; c < kCols; ++c) {
                    sums[r][c] = dot_pairs(sums[r][c], values[c], weight);
                }
            }
        }
    }
    for (int r = 0; r < kCount; ++r) {
        float* to = work.sums + rows[r].index * call.value_dim + col;
        for (int c = 0; c < kCols; ++c) store_floats(to + c * kLanes, sums[r][c], kLanes);
    }
}

// The same for all columns.
template <int kCount, int kVecs>
inline void add_values(const AutotpAttention& call, const Row* rows, const Block& block,
                       const Work& work, const uint16_t (*weights)[kVecs * kLanes]) {
    constexpr int kCols = 4;
    int64_t col = 0;
    for (; col + kCols * kLanes <= call.value_dim; col += kCols * kLanes) {
        add_columns<kCount, kVecs, kCols>(call, rows, block, work, weights, col);
    }
    for (; col < call.value_dim; col += kLanes) {
        add_columns<kCount, kVecs, 1>(call, rows, block, work, weights, col);
    }
}

// Not inlined, as gcc 12 else runs out of registers and takes a third longer.
template <int kCount, int kVecs>
__attribute__((noinline)) void attend_vectors(const AutotpAttention& call, const Row* rows,
                                              int64_t start, const Block& block,
                                              const Work& work) {
    Floats logits[kCount][kVecs];
    find_logits<kCount, kVecs>(call, rows, block, logits);
    alignas(64) uint16_t weights[kCount][kVecs * kLanes];
    for (int r = 0; r < kCount; ++r) {
        find_weights<kVecs>(call, rows[r], start, work, logits[r], weights[r]);
    }
    add_values<kCount, kVecs>(call, rows, block, work, weights);
}

// Lets rows attend to a block; what lies behind the last row's position is left out by vectors.
template <int kCount>
void attend_block(const AutotpAttention& call, const Row* rows, int64_t start,
                  const Block& block, const Work& work) {
    switch ((rows[kCount - 1].position - start) / kLanes) {
        case 0: return attend_vectors<kCount, 1>(call, rows, start, block, work);
        case 1: return attend_vectors<kCount, 2>(call, rows, start, block, work);
        case 2: return attend_vectors<kCount, 3>(call, rows, start, block, work);
        default: return attend_vectors<kCount, kVectors>(call, rows, start, block, work);
    }
}

void run_task(const AutotpAttention& call, const Task& task) {
    const int64_t group = call.heads / call.kv_heads;
    const int64_t rows = (task.stop_token - task.first_token) * group;
    const int64_t group_words = kLanes / 2 * call.value_dim;
    Scratch scratch;
    scratch.start(4 * (rows * (call.value_dim + 1 + kLanes) + 2 * group_words) + 64 * 8);
    const Work work{scratch.take<float>(rows * call.value_dim), scratch.take<float>(rows),
                    scratch.take<float>(rows * kLanes), scratch.take<uint32_t>(group_words),
                    scratch.take<uint32_t>(group_words)};
    std::fill_n(work.sums, rows * call.value_dim, 0.0f);
    std::fill_n(work.peaks, rows, kNothing);
    std::fill_n(work.totals, rows * kLanes, 0.0f);
    std::fill_n(work.zeros, group_words, 0u);

    const int64_t stop = call.starts[task.sequence + 1];
    const int64_t context = call.context_lens[task.sequence];
    const auto position = [&](int64_t token) { return context - (stop - token); };
    const auto make_row = [&](int64_t index) {
        const int64_t token = task.first_token + index / group;
        const int64_t head = task.kv_head * group + index % group;
        return Row{call.query + token * call.query_token_stride + head * call.query_head_stride,
                   position(token), index};
    };
    const int64_t last = position(task.stop_token - 1) + 1;
    int64_t start = 0;
    if (call.window) {
        start = std::max<int64_t>(0, position(task.first_token) - call.window + 1);
        start = start / kPositions * kPositions;
    }
    Block here, next;
    find_block(call, task, start, last, work, next);
    for (; start < last; start += kPositions) {
        std::swap(here, next);
        if (start + kPositions < last) {
            find_block(call, task, start + kPositions, last, work, next);
            prefetch_block(call, next);
        }
        // Rows of tokens before the block see nothing of it.
        const int64_t unseeing = std::max<int64_t>(0, start - position(task.first_token));
        int64_t index = std::min(rows, unseeing * group);
        const auto attend = [&](auto count) {
            Row some[count];
            for (; index + count <= rows; index += count) {
                for (int r = 0; r < count; ++r) some[r] = make_row(index + r);
                attend_block<count>(call, some, start, here, work);
            }
        };
        attend(std::integral_constant<int, kRowsAtOnce>());
        attend(std::integral_constant<int, 1>());
    }
    for (int64_t index = 0; index < rows; ++index) {
        const int64_t token = task.first_token + index / group;
        const int64_t head = task.kv_head * group + index % group;
        uint16_t* to = call.out + (token * call.heads + head) * call.value_dim;
        const float total = sum_lanes(load_floats(work.totals + index * kLanes));
        const Floats inverse = same_float(1.0f / total);
        for (int64_t col = 0; col < call.value_dim; col += kLanes) {
            const Floats sums = load_floats(work.sums + index * call.value_dim + col);
            store_bfloat16(to + col, multiply(sums, inverse), kLanes);
        }
    }
}

}  // namespace

extern "C" {

// Stores tokens' keys [tokens, kv_heads, head_dim] and values in their slots; each token is
// `key_stride` or `value_stride` numbers after the one before, each head `..._head_stride`.
void autotp_store(const uint16_t* key, int64_t key_stride, int64_t key_head_stride,
                  const uint16_t* value, int64_t value_stride, int64_t value_head_stride,
                  const int64_t* slots, uint16_t* keys, uint16_t* values, int64_t tokens,
                  int64_t kv_heads, int64_t head_dim, int64_t value_dim) {
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t head = 0; head < kv_heads; ++head) {
            store_key(key + token * key_stride + head * key_head_stride, keys, slots[token], head,
                      kv_heads, head_dim);
            store_value(value + token * value_stride + head * value_head_stride, values,
                        slots[token], head, kv_heads, value_dim);
        }
    }
}

// Returns 0, or 1 when there is no memory.
int autotp_paged_attention(const AutotpAttention* call, int64_t threads) {
    const int64_t tokens_per_task =
        std::max<int64_t>(1, kRowsPerTask / (call->heads / call->kv_heads));
    int64_t most_tasks = 0;  // of one sequence
    for (int64_t i = 0; i < call->sequences; ++i) {
        const int64_t tokens = call->starts[i + 1] - call->starts[i];
        most_tasks = std::max(most_tasks, (tokens + tokens_per_task - 1) / tokens_per_task);
    }
    const int64_t tasks = call->sequences * call->kv_heads * most_tasks;
    bool failed = false;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < tasks; ++i) {
        const int64_t sequence = i / most_tasks / call->kv_heads;
        const int64_t stop = call->starts[sequence + 1];
        // The last tokens have the longest contexts: they come first.
        const int64_t part = most_tasks - 1 - i % most_tasks;
        const int64_t first = call->starts[sequence] + part * tokens_per_task;
        if (first >= stop) continue;
        const int64_t kv_head = i / most_tasks % call->kv_heads;
        try {
            run_task(*call, {sequence, kv_head, first, std::min(stop, first + tokens_per_task)});
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            failed = true;
        }
    }
    return failed;
}

}  // extern "C"

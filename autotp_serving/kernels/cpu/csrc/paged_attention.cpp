// Attention over blocks of bfloat16 or int8 keys and values, without gathering them: decodes and
// chunks of prompts alike.
//
// Runs on every rank, in the thread that calls and in the OpenMP threads it shares with torch.
// The unit of work is one sequence, one key/value head and some of its query tokens; their query
// heads that share the key/value head are the rows of a small product. The context is walked in
// blocks of 64 positions, which lie in the order that the products take, with a running maximum and
// sum per row. A row's result depends on its own context only: neither on the threads, nor on the
// batch, nor on how the prompt was cut into chunks.
#include <omp.h>

#include <algorithm>
#include <cmath>
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
    float* sums;        // [rows, value_dim]
    float* peaks;       // [rows], largest logit so far
    float* totals;      // [rows, 16], sum of weights so far, by lane
    uint32_t* partial;  // [8, value_dim], the values of a group that the context ends in
    uint16_t* queries;  // [rows, head_dim] rounded, where the cache wants it
};

// softcap * tanh(x / softcap), by way of 2**-|..| so that nothing overflows.
inline Floats cap(Floats x, float softcap) {
    const Floats magnitude = larger(x, multiply(x, same_float(-1)));
    const Floats small =
        power_of_two(multiply(magnitude, same_float(-2.0f * kLog2e / softcap)));
    const Floats tanh = divide(subtract(same_float(1), small), add(same_float(1), small));
    return multiply(copy_sign(tanh, x), same_float(softcap));
}

// A row of queries of a task.
struct Row {
    const uint16_t* query;  // words of two numbers, as the cache's products take them
    float unit;             // what they are multiplied by
    int64_t position;
    int64_t index;  // among the task's rows
};

// Where the keys and values of a block of positions lie, a group of 16 each.
template <class Number>
struct Block {
    const Number* keys[kVectors];
    const Number* values[kVectors];
    const float* key_scales[kVectors];
    const float* value_scales[kVectors];
};

// Products with a cache of bfloat16: weights are rounded to bfloat16.
struct BFloat16Cache {
    using Number = uint16_t;
    using Sum = Floats;
    static constexpr bool kHasScales = false;

    static Sum zero() { return same_float(0); }
    static Bytes load(const Number* from) { return load_bytes(from); }
    static Sum add_product(Sum sum, Bytes numbers, int32_t word) {
        return dot_pairs(sum, numbers, word);
    }
    static Floats find_logit(Sum sum, const Row&, const float*) { return sum; }
    static Sum start_values(const float* from) { return load_floats(from); }
    static Floats finish_values(Sum sum, const float*, float) { return sum; }
};

// Products with a cache of int8, exact in 32 bits: a query is rounded to 16 bits by its largest
// number, and so are a row's weights for a block, each times its value's scale.
struct Int8Cache {
    using Number = int8_t;
    using Sum = Ints;
    static constexpr bool kHasScales = true;

    static Sum zero() { return same_int(0); }
    static Bytes load(const Number* from) { return load_int8_pairs(from); }
    static Sum add_product(Sum sum, Bytes numbers, int32_t word) {
        return dot_int16_pairs(sum, numbers, word);
    }
    static Floats find_logit(Sum sum, const Row& row, const float* scales) {
        return multiply(to_floats(sum), multiply(load_floats(scales), same_float(row.unit)));
    }
    static Sum start_values(const float*) { return zero(); }
    static Floats finish_values(Sum sum, const float* from, float unit) {
        return multiply_add(to_floats(sum), same_float(unit), load_floats(from));
    }
};

constexpr float kLargestWord = 32767;

// Finds the block from position `start` on. Beyond `stop`, the context's end, is whatever others
// left behind: no row sees the logits, but a value that is NaN no weight of zero takes away.
// Codes are never NaN; in place of the rest of a group of bfloat16 come zeros.
template <class Cache>
inline void find_block(const AutotpAttention& call, const Task& task, int64_t start, int64_t stop,
                       const Work& work, Block<typename Cache::Number>& block) {
    using Number = typename Cache::Number;
    const int32_t* table = call.tables + call.rows[task.sequence] * call.table_stride;
    for (int v = 0; v < kVectors; ++v) {
        const int64_t position = std::min(start + v * kLanes, (stop - 1) / kLanes * kLanes);
        const int64_t slot = table[position / call.block_size] * call.block_size +
                             position % call.block_size;
        const auto find = [&](const auto* pool, int64_t size) {
            return pool + find_head(slot / kGroupSlots, task.kv_head, call.kv_heads, size);
        };
        block.keys[v] = find(static_cast<const Number*>(call.pools.keys), call.head_dim);
        block.values[v] = find(static_cast<const Number*>(call.pools.values), call.value_dim);
        if constexpr (Cache::kHasScales) {
            block.key_scales[v] = find(call.pools.key_scales, 1);
            block.value_scales[v] = find(call.pools.value_scales, 1);
            continue;
        }
        const int64_t left = stop - (start + v * kLanes);
        if (left <= 0 || left >= kLanes) continue;
        for (int64_t pair = 0; pair < kLanes / 2; ++pair) {
            const uint32_t kept = 2 * pair + 1 < left ? ~0u : 2 * pair < left ? 0xffffu : 0u;
            for (int64_t col = 0; col < call.value_dim; ++col) {
                const int64_t at = pair * call.value_dim + col;
                work.partial[at] = load_int32(block.values[v] + 2 * at) & kept;
            }
        }
        block.values[v] = reinterpret_cast<const Number*>(work.partial);
    }
}

// Asks for the memory of the next block, some lines at a time: a core waits for no more than about
// twenty, and all at once would hold up what is read meanwhile.
class Ahead {
  public:
    // In at most so many `pieces`.
    template <class Cache>
    void start(const AutotpAttention& call, const Block<typename Cache::Number>& block,
               int64_t pieces) {
        constexpr int64_t kPerNumber = kLanes * sizeof(typename Cache::Number);
        part_ = count_ = 0;
        at_ = 0;
        int64_t lines = 0;
        const auto add = [&](const void* from, int64_t bytes) {
            parts_[count_++] = {static_cast<const char*>(from), bytes};
            lines += (bytes + 63) / 64;
        };
        for (int v = 0; v < kVectors; ++v) {
            add(block.keys[v], call.head_dim * kPerNumber);
            add(block.values[v], call.value_dim * kPerNumber);
            if constexpr (Cache::kHasScales) {
                add(block.key_scales[v], kLanes * sizeof(float));
                add(block.value_scales[v], kLanes * sizeof(float));
            }
        }
        piece_ = std::max<int64_t>(8, (lines + pieces - 1) / pieces);
    }
    void ask() {
        if (part_ < count_) ask_more();
    }

  private:
    __attribute__((noinline)) void ask_more() {
        for (int64_t i = 0; i < piece_ && part_ < count_; ++i) {
            prefetch_far(parts_[part_].from + at_);
            at_ += 64;
            if (at_ >= parts_[part_].bytes) {
                at_ = 0;
                ++part_;
            }
        }
    }

    struct Part {
        const char* from;
        int64_t bytes;
    };
    Part parts_[4 * kVectors];
    int part_ = 0, count_ = 0;  // the part that is next, of how many
    int64_t at_ = 0, piece_ = 0;
};

// Logits of `kCount` rows for the first `kVecs` vectors of a block of positions.
template <class Cache, int kCount, int kVecs>
inline void find_logits(const AutotpAttention& call, const Row* rows,
                        const Block<typename Cache::Number>& block, Floats (*to)[kVecs]) {
    typename Cache::Sum sums[kCount][kVecs];
    for (int r = 0; r < kCount; ++r) {
        for (int v = 0; v < kVecs; ++v) sums[r][v] = Cache::zero();
    }
    for (int64_t word = 0; word < call.head_dim / 2; ++word) {
        Bytes keys[kVecs];
        for (int v = 0; v < kVecs; ++v) {
            keys[v] = Cache::load(block.keys[v] + word * 2 * kLanes);
        }
        for (int r = 0; r < kCount; ++r) {
            const int32_t query = load_int32(rows[r].query + 2 * word);
            for (int v = 0; v < kVecs; ++v) {
                sums[r][v] = Cache::add_product(sums[r][v], keys[v], query);
            }
        }
    }
    for (int r = 0; r < kCount; ++r) {
        for (int v = 0; v < kVecs; ++v) {
            to[r][v] = Cache::find_logit(sums[r][v], rows[r], block.key_scales[v]);
        }
    }
}

// Stores weights times their values' scales as 16-bit numbers and returns what to multiply those
// by, NaN if a scale is. Lanes outside [from, to) become 0, whatever their scales.
template <int kVecs>
inline float store_scaled(const Block<int8_t>& block, Floats* weights, int from, int to,
                          uint16_t* words) {
    Ints magnitudes = same_int(0);
    for (int v = 0; v < kVecs; ++v) {
        weights[v] = multiply(weights[v], load_floats(block.value_scales[v]));
        if (from > 0 || to < kVecs * kLanes) {
            weights[v] = keep_lanes(weights[v], from - v * kLanes, to - v * kLanes, 0);
        }
        magnitudes = larger_int(magnitudes, magnitude_bits(weights[v]));
    }
    const float largest = as_float(static_cast<uint32_t>(largest_int(magnitudes)));
    const Floats inverse = same_float(kLargestWord / std::max(largest, kSmallestDivisor));
    for (int v = 0; v < kVecs; ++v) {
        store_as_int16(words + v * kLanes, multiply(weights[v], inverse));
    }
    return largest / kLargestWord;
}

// Turns a row's logits into weights of 16 bits, and returns what to multiply them by. Where a logit
// is above all before, what has been summed so far shrinks.
template <class Cache, int kVecs>
inline float find_weights(const AutotpAttention& call, const Row& row, int64_t start,
                          const Block<typename Cache::Number>& block, const Work& work,
                          Floats* logits, uint16_t* words) {
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
            logits[v] = keep_lanes(logits[v], from - v * kLanes, to - v * kLanes,
                                   -__builtin_inff());
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
        logits[v] = power_of_two(subtract(logits[v], same_float(peak)));
        total = add(total, logits[v]);
        if constexpr (!Cache::kHasScales) store_bfloat16(words + v * kLanes, logits[v], kLanes);
    }
    store_floats(totals, total, kLanes);
    if constexpr (Cache::kHasScales) return store_scaled<kVecs>(block, logits, from, to, words);
    return 1;
}

// Adds weights times values to the sums of `kCount` rows, for `kCols` vectors of columns.
template <class Cache, int kCount, int kVecs, int kCols>
inline void add_columns(const AutotpAttention& call, const Row* rows,
                        const Block<typename Cache::Number>& block, const Work& work,
                        const uint16_t (*words)[kVecs * kLanes], const float* units, int64_t col) {
    typename Cache::Sum sums[kCount][kCols];
    for (int r = 0; r < kCount; ++r) {
        const float* from = work.sums + rows[r].index * call.value_dim + col;
        for (int c = 0; c < kCols; ++c) sums[r][c] = Cache::start_values(from + c * kLanes);
    }
    for (int v = 0; v < kVecs; ++v) {
        const auto* from = block.values[v] + 2 * col;
        for (int pair = 0; pair < kLanes / 2; ++pair, from += 2 * call.value_dim) {
            Bytes values[kCols];
            for (int c = 0; c < kCols; ++c) values[c] = Cache::load(from + c * 2 * kLanes);
            for (int r = 0; r < kCount; ++r) {
                const int32_t weight = load_int32(words[r] + v * kLanes + 2 * pair);
                for (int c = 0; c < kCols; ++c) {
                    sums[r][c] = Cache::add_product(sums[r][c], values[c], weight);
                }
            }
        }
    }
    for (int r = 0; r < kCount; ++r) {
        float* to = work.sums + rows[r].index * call.value_dim + col;
        for (int c = 0; c < kCols; ++c, to += kLanes) {
            store_floats(to, Cache::finish_values(sums[r][c], to, units[r]), kLanes);
        }
    }
}

// Lets rows attend to the first `kVecs` vectors of a block. Not inlined, as gcc 12 else runs out of
// registers and takes a third longer.
template <class Cache, int kCount, int kVecs>
__attribute__((noinline)) void attend_vectors(const AutotpAttention& call, const Row* rows,
                                              int64_t start,
                                              const Block<typename Cache::Number>& block,
                                              const Work& work, Ahead& ahead) {
    ahead.ask();
    Floats logits[kCount][kVecs];
    find_logits<Cache, kCount, kVecs>(call, rows, block, logits);
    alignas(64) uint16_t words[kCount][kVecs * kLanes];
    float units[kCount];
    for (int r = 0; r < kCount; ++r) {
        ahead.ask();
        units[r] = find_weights<Cache, kVecs>(call, rows[r], start, block, work, logits[r],
                                              words[r]);
    }
    constexpr int kCols = 4;
    int64_t col = 0;
    for (; col + kCols * kLanes <= call.value_dim; col += kCols * kLanes) {
        add_columns<Cache, kCount, kVecs, kCols>(call, rows, block, work, words, units, col);
    }
    for (; col < call.value_dim; col += kLanes) {
        add_columns<Cache, kCount, kVecs, 1>(call, rows, block, work, words, units, col);
    }
}

// Lets rows attend to a block; what lies behind the last row's position is left out by vectors.
template <class Cache, int kCount>
void attend_block(const AutotpAttention& call, const Row* rows, int64_t start,
                  const Block<typename Cache::Number>& block, const Work& work, Ahead& ahead) {
    switch ((rows[kCount - 1].position - start) / kLanes) {
        case 0: return attend_vectors<Cache, kCount, 1>(call, rows, start, block, work, ahead);
        case 1: return attend_vectors<Cache, kCount, 2>(call, rows, start, block, work, ahead);
        case 2: return attend_vectors<Cache, kCount, 3>(call, rows, start, block, work, ahead);
        default:
            return attend_vectors<Cache, kCount, kVectors>(call, rows, start, block, work, ahead);
    }
}

template <class Cache>
void run_task(const AutotpAttention& call, const Task& task) {
    const int64_t group = call.heads / call.kv_heads;
    const int64_t rows = (task.stop_token - task.first_token) * group;
    const int64_t group_words = kLanes / 2 * call.value_dim;
    Scratch scratch;
    const int64_t query_size = Cache::kHasScales ? call.head_dim : 0;
    scratch.start(4 * (rows * (call.value_dim + 2 + kLanes) + group_words) +
                  2 * rows * query_size + 64 * 8);
    const Work work{scratch.take<float>(rows * call.value_dim), scratch.take<float>(rows),
                    scratch.take<float>(rows * kLanes), scratch.take<uint32_t>(group_words),
                    scratch.take<uint16_t>(rows * query_size)};
    float* units = scratch.take<float>(rows);
    std::fill_n(work.sums, rows * call.value_dim, 0.0f);
    std::fill_n(work.peaks, rows, kNothing);
    std::fill_n(work.totals, rows * kLanes, 0.0f);

    const int64_t stop = call.starts[task.sequence + 1];
    const int64_t context = call.context_lens[task.sequence];
    const auto position = [&](int64_t token) { return context - (stop - token); };
    const auto make_row = [&](int64_t index) {
        const int64_t token = task.first_token + index / group;
        const int64_t head = task.kv_head * group + index % group;
        const uint16_t* query =
            call.query + token * call.query_token_stride + head * call.query_head_stride;
        return Row{query, 1, position(token), index};
    };
    for (int64_t index = 0; Cache::kHasScales && index < rows; ++index) {
        units[index] =
            round_row(make_row(index).query, work.queries + index * query_size, query_size,
                      kLargestWord);
    }
    const int64_t last = position(task.stop_token - 1) + 1;
    int64_t start = 0;
    if (call.window) {
        start = std::max<int64_t>(0, position(task.first_token) - call.window + 1);
        start = start / kPositions * kPositions;
    }
    Block<typename Cache::Number> here, next;
    Ahead ahead;
    find_block<Cache>(call, task, start, last, work, next);
    for (; start < last; start += kPositions) {
        std::swap(here, next);
        if (start + kPositions < last) {
            find_block<Cache>(call, task, start + kPositions, last, work, next);
            ahead.start<Cache>(call, next, rows + (rows + kRowsAtOnce - 1) / kRowsAtOnce);
        }
        // Rows of tokens before the block see nothing of it.
        const int64_t unseeing = std::max<int64_t>(0, start - position(task.first_token));
        int64_t index = std::min(rows, unseeing * group);
        const auto attend = [&](auto count) {
            Row some[count];
            for (; index + count <= rows; index += count) {
                for (int r = 0; r < count; ++r) {
                    some[r] = make_row(index + r);
                    if constexpr (Cache::kHasScales) {
                        some[r].query = work.queries + (index + r) * query_size;
                        some[r].unit = units[index + r];
                    }
                }
                attend_block<Cache, count>(call, some, start, here, work, ahead);
            }
        };
        attend(std::integral_constant<int, kRowsAtOnce>());
        attend(std::integral_constant<int, 1>());
    }
    for (int64_t index = 0; index < rows; ++index) {
        const int64_t token = task.first_token + index / group;
        const int64_t head = task.kv_head * group + index % group;
        uint16_t* to = call.out + (token * call.heads + head) * call.value_dim;
        float total = sum_lanes(load_floats(work.totals + index * kLanes));
        if (call.sinks) total += std::exp2(call.sinks[head] * kLog2e - work.peaks[index]);
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
                  const int64_t* slots, const AutotpPools* pools, int64_t tokens,
                  int64_t kv_heads, int64_t head_dim, int64_t value_dim) {
    for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t head = 0; head < kv_heads; ++head) {
            const HeadWriter writer{*pools, slots[token], head, kv_heads};
            writer.store_key(key + token * key_stride + head * key_head_stride, head_dim);
            writer.store_value(value + token * value_stride + head * value_head_stride, value_dim);
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
            const Task task{sequence, kv_head, first, std::min(stop, first + tokens_per_task)};
            if (call->pools.key_scales) {
                run_task<Int8Cache>(*call, task);
            } else {
                run_task<BFloat16Cache>(*call, task);
            }
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            failed = true;
        }
    }
    return failed;
}

}  // extern "C"

// y = x * weight^T with weights of 16 bits, bfloat16 or float16, for any number of tokens.
//
// Runs on every rank, in the thread that calls and in the OpenMP threads it shares with torch. Each
// result is summed from the first pair of columns to the last, whatever stands beside its token.
//
// A packed weight is read from front to back: groups of 16 rows, in each the pairs of columns one
// after the other, in each pair 16 rows. One that others read too, such as an embedding, stays in
// rows; then a group is packed each time that it is needed.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#include ISA_VECTORS

// A weight as kernels/cpu/dense.py describes it; the same fields in the same order.
struct AutotpDense {
    int64_t rows, cols;
    int64_t stride;  // numbers from a row to the next; 0 if the weight is packed
    const uint16_t* numbers;
};

namespace {

constexpr int kRows = 16;
constexpr int kCols = 32;  // a panel: 16 rows of 16 pairs
constexpr int kPanel = kRows * kCols / 2;  // words
// Groups that share what is fetched of the tokens, as far as their sums fit in the registers. One
// or two tokens wait for memory alone, which is read quickest in a single stream.
constexpr int kTogether = kMaxTokens >= 8 ? 2 : 1;
constexpr int64_t kWorthPairing = 3;
// Of the tokens' numbers, made ready at once: they take half of a second cache of 1 MiB, while the
// weight passes by.
constexpr int64_t kBytesAtOnce = 1 << 19;
constexpr int64_t kAhead = 512;  // columns of rows asked for before they are packed

// What a type of numbers becomes before it is multiplied, and how.
#ifdef __AVX512BF16__
struct BFloat16 {
    using Number = uint16_t;
    using Weights = Bytes;
    static void read(const uint16_t* from, Number* to) { std::memcpy(to, from, kCols * sizeof *to); }
    static Weights load(const uint32_t* pairs) { return load_bytes(pairs); }
    static Floats add_pair(Floats sum, Weights weights, const Number* x) {
        return dot_pairs(sum, weights, load_int32(x));
    }
    static void store(uint16_t* to, Floats sums, int count) { store_bfloat16(to, sums, count); }
};
#endif

// Without instructions for their products: as floats, the two of a pair apart.
template <class T>
struct Widened {
    using Number = float;
    struct Weights {
        Floats first, second;
    };
    static void read(const uint16_t* from, Number* to) {
        for (int i = 0; i < kCols; i += kRows) store_floats(to + i, T::load(from + i), kRows);
    }
    static Weights load(const uint32_t* pairs) {
        const Bytes words = load_bytes(pairs);
        return {T::lower(words), T::upper(words)};
    }
    static Floats add_pair(Floats sum, const Weights& weights, const Number* x) {
        sum = multiply_add(weights.first, same_float(x[0]), sum);
        return multiply_add(weights.second, same_float(x[1]), sum);
    }
    static void store(uint16_t* to, Floats sums, int count) { T::store(to, sums, count); }
};

#ifndef __AVX512BF16__
struct BFloat16Floats {
    static Floats load(const uint16_t* from) { return load_bfloat16(from); }
    static Floats lower(Bytes pairs) { return as_floats(shift_left<16>(pairs)); }
    static Floats upper(Bytes pairs) {
        return as_floats(both(pairs, same_int(static_cast<int32_t>(0xffff0000))));
    }
    static void store(uint16_t* to, Floats sums, int count) { store_bfloat16(to, sums, count); }
};
using BFloat16 = Widened<BFloat16Floats>;
#endif

struct Float16Floats {
    static Floats load(const uint16_t* from) { return load_halves(from); }
    static Floats lower(Bytes pairs) { return lower_halves(pairs); }
    static Floats upper(Bytes pairs) { return upper_halves(pairs); }
    static void store(uint16_t* to, Floats sums, int count) { store_halves(to, sums, count); }
};
using Float16 = Widened<Float16Floats>;

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// Memory of this thread for one purpose, kept between calls; null when there is none.
template <class Purpose>
void* scratch(size_t bytes) {
    static thread_local std::unique_ptr<void, Free> memory;
    static thread_local size_t size = 0;
    if (bytes > size) {
        size = 0;
        memory.reset();
        memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        if (!memory) return nullptr;
        size = bytes;
    }
    return memory.get();
}

int64_t count_groups(const AutotpDense& weight) { return (weight.rows + kRows - 1) / kRows; }
int64_t count_panels(const AutotpDense& weight) { return (weight.cols + kCols - 1) / kCols; }
int64_t group_words(const AutotpDense& weight) { return count_panels(weight) * kPanel; }

// Packs the 16 rows of a group. Rows beyond the last are a copy of it; columns beyond, zeros.
void pack_group(const AutotpDense& weight, int64_t group, uint32_t* to) {
    for (int64_t col = 0; col < weight.cols; col += kCols, to += kPanel) {
        const uint32_t* rows[kRows];
        alignas(64) uint16_t padded[kRows][kCols];
        for (int i = 0; i < kRows; ++i) {
            const int64_t row = std::min<int64_t>(group * kRows + i, weight.rows - 1);
            const uint16_t* from = weight.numbers + row * weight.stride + col;
            if (weight.cols - col < kCols) {
                std::memset(padded[i], 0, sizeof padded[i]);
                std::memcpy(padded[i], from, (weight.cols - col) * sizeof *from);
                from = padded[i];
            } else {
                // Into the second cache: rows a power of two apart would push each other out of the
                // first. Past the end of these rows the next 16 follow.
                const bool is_here = col + kAhead < weight.cols;
                prefetch_far(from + kAhead + (is_here ? 0 : kRows * weight.stride - weight.cols));
            }
            rows[i] = reinterpret_cast<const uint32_t*>(from);
        }
        transpose_words(rows, to, kRows);
    }
}

// A group of a weight, packed, of which each thread has one for each `kPlace`; null when there is no
// memory.
template <int kPlace>
const uint32_t* find_group(const AutotpDense& weight, int64_t group) {
    const int64_t words = group_words(weight);
    if (weight.stride == 0) {
        return reinterpret_cast<const uint32_t*>(weight.numbers) + group * words;
    }
    using Purpose = std::integral_constant<int, kPlace>;
    auto* packed = static_cast<uint32_t*>(scratch<Purpose>(words * sizeof(uint32_t)));
    if (packed) pack_group(weight, group, packed);
    return packed;
}

// The numbers of `count` tokens in the order in which they are multiplied: [cols / 32, tokens, 32].
template <class T>
void read_tokens(const uint16_t* x, int64_t x_stride, int64_t count, int64_t cols,
                 typename T::Number* to) {
    for (int64_t col = 0; col < cols; col += kCols) {
        const int64_t size = std::min<int64_t>(kCols, cols - col);
        for (int64_t m = 0; m < count; ++m, to += kCols) {
            uint16_t padded[kCols] = {};
            std::memcpy(padded, x + m * x_stride + col, size * sizeof *padded);
            T::read(padded, to);
        }
    }
}

// Multiplies kGroups groups, of which the first has `rows` rows and more, with `count` tokens, at
// most kTokens, that were read together.
template <class T, int kGroups, int kTokens>
void multiply_tokens(const uint32_t* const (&groups)[kGroups], int64_t panels,
                     const typename T::Number* x, int64_t count, uint16_t* out, int64_t out_stride,
                     int64_t rows) {
    if constexpr (kTokens > 1) {
        if (count < kTokens) {
            return multiply_tokens<T, kGroups, kTokens - 1>(groups, panels, x, count, out,
                                                            out_stride, rows);
        }
    }
    Floats sums[kGroups][kTokens];
    for (auto& of_group : sums) {
        for (Floats& sum : of_group) sum = same_float(0);
    }
    for (int64_t panel = 0; panel < panels; ++panel, x += kTokens * kCols) {
#pragma GCC unroll 4
        for (int pair = 0; pair < kCols / 2; ++pair) {
            typename T::Weights weights[kGroups];
            for (int g = 0; g < kGroups; ++g) {
                weights[g] = T::load(groups[g] + panel * kPanel + pair * kRows);
            }
            for (int m = 0; m < kTokens; ++m) {
                for (int g = 0; g < kGroups; ++g) {
                    sums[g][m] = T::add_pair(sums[g][m], weights[g], x + m * kCols + 2 * pair);
                }
            }
        }
    }
    for (int g = 0; g < kGroups; ++g) {
        const int count_rows = static_cast<int>(std::min<int64_t>(kRows, rows - g * kRows));
        for (int m = 0; m < kTokens; ++m) {
            T::store(out + m * out_stride + g * kRows, sums[g][m], count_rows);
        }
    }
}

// Multiplies kGroups groups from `group` on with all tokens that were read. False when there is no
// memory.
template <class T, int kGroups>
bool multiply_groups(const AutotpDense& weight, int64_t group, const typename T::Number* x,
                     int64_t tokens, uint16_t* out, int64_t out_stride) {
    const uint32_t* groups[kGroups] = {find_group<0>(weight, group)};
    if constexpr (kGroups > 1) groups[1] = find_group<1>(weight, group + 1);
    for (const uint32_t* found : groups) {
        if (!found) return false;
    }
    const int64_t panels = count_panels(weight), row = group * kRows;
    for (int64_t m = 0; m < tokens; m += kMaxTokens) {
        multiply_tokens<T, kGroups, kMaxTokens>(groups, panels, x + m * panels * kCols, tokens - m,
                                                out + m * out_stride + row, out_stride,
                                                weight.rows - row);
    }
    return true;
}

template <class T>
int multiply(const AutotpDense* const* weights, int64_t count, const uint16_t* x, int64_t x_stride,
             uint16_t* out, int64_t tokens, int64_t threads) {
    using Number = typename T::Number;
    const int64_t cols = weights[0]->cols, padded = count_panels(*weights[0]) * kCols;
    const int64_t chunk_bytes = kMaxTokens * padded * sizeof(Number);
    const int64_t most = std::max<int64_t>(1, kBytesAtOnce / chunk_bytes) * kMaxTokens;
    const int64_t at_once = std::min(tokens, most);
    struct Tokens;
    Number* numbers = static_cast<Number*>(scratch<Tokens>(at_once * padded * sizeof(Number)));
    if (!numbers) return 1;
    const int64_t together = at_once >= kWorthPairing ? kTogether : 1;
    const auto count_units = [together](const AutotpDense& weight) {
        return (count_groups(weight) + together - 1) / together;
    };
    int64_t rows = 0, units = 0;
    for (int64_t i = 0; i < count; ++i) {
        rows += weights[i]->rows;
        units += count_units(*weights[i]);
    }
    const int64_t share = std::max<int64_t>(1, units / (threads * 8));
    int failed = 0;
    for (int64_t start = 0; start < tokens; start += at_once) {
        const int64_t some = std::min(at_once, tokens - start);
        for (int64_t m = 0; m < some; m += kMaxTokens) {
            read_tokens<T>(x + (start + m) * x_stride, x_stride,
                           std::min<int64_t>(kMaxTokens, some - m), cols, numbers + m * padded);
        }
        // Dynamic, because a core may be busy with something else; who computes a row does not
        // change it.
#pragma omp parallel for num_threads(threads) schedule(dynamic, share) if (threads > 1) \
    reduction(| : failed)
        for (int64_t index = 0; index < units; ++index) {
            const AutotpDense* const* weight = weights;
            int64_t unit = index, first_col = 0;
            for (; unit >= count_units(**weight); ++weight) {
                unit -= count_units(**weight);
                first_col += (*weight)->rows;
            }
            const int64_t first = unit * together;
            const int64_t end = std::min(first + together, count_groups(**weight));
            uint16_t* to = out + start * rows + first_col;
            if (kTogether > 1 && end - first == kTogether) {
                failed |= !multiply_groups<T, kTogether>(**weight, first, numbers, some, to, rows);
            } else {
                failed |= !multiply_groups<T, 1>(**weight, first, numbers, some, to, rows);
            }
        }
    }
    return failed;
}

}  // namespace

extern "C" {

// Packs a weight in rows to `to`, 16 * 32 numbers for each of its panels.
void autotp_pack_dense(const AutotpDense* weight, uint32_t* to, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t group = 0; group < count_groups(*weight); ++group) {
        pack_group(*weight, group, to + group * group_words(*weight));
    }
}

// Multiplies `tokens` rows of `x`, each `x_stride` numbers after the one before, by `count` weights
// of as many columns, into `out` [tokens, rows of all weights]. All have the type `dtype`: 1 is
// bfloat16, as in low_bit_linear.cpp, 2 float16. Returns 0, or 1 when there is no memory.
int autotp_dense_linear(const AutotpDense* const* weights, int64_t count, const void* x,
                        int64_t x_stride, void* out, int64_t tokens, int64_t dtype,
                        int64_t threads) {
    const auto run = dtype == 1 ? multiply<BFloat16> : multiply<Float16>;
    return run(weights, count, static_cast<const uint16_t*>(x), x_stride,
               static_cast<uint16_t*>(out), tokens, threads);
}

}  // extern "C"

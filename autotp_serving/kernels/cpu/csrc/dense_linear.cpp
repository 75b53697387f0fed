// y = x * weight^T with weights of 16 bits as they are stored: bfloat16 for a few tokens, float16
// for any number.
//
// Runs on every rank, in the thread that calls and in the OpenMP threads it shares with torch. Each
// result is summed as oneDNN sums bfloat16 for many tokens, in pieces of 1,024 or 512 columns and in each
// from the first pair to the last: so it does not matter which of the two multiplies a token. The
// weights need no order of their own; 16 rows at a time are turned in registers as they come.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include ISA_VECTORS

// A weight as kernels/cpu/dense.py describes it.
struct AutotpDense {
    int64_t rows, cols, stride;
    const uint16_t* numbers;  // [rows, cols], rows `stride` numbers apart
};

namespace {

constexpr int kRows = 16;
constexpr int kCols = 32;  // turned at once: 16 rows of 16 pairs
constexpr int kPanel = kRows * kCols / 2;  // words of a panel as it was turned
// Panels made before tokens are multiplied with them: one while memory sets the pace, so that
// reading goes on meanwhile; for many tokens as many as stay in the nearest cache.
constexpr int kManyPanels = 4;
// Columns that are summed apart: oneDNN takes fewer at once where there are fewer.
constexpr int64_t piece_of(int64_t cols) { return cols <= 1024 ? 512 : 1024; }
constexpr int64_t kMostTokens = 64;  // for which a weight is turned once
constexpr int64_t kAhead = 512;      // columns asked for before they are needed

// What a type of numbers becomes before it is multiplied, and how: a column pair of a panel is
// one vector of pairs in bfloat16, two of floats in float16.
struct BFloat16 {
    using Number = uint16_t;
    static constexpr int kWords = 1;  // of each that was turned
    static void read(const uint16_t* from, Number* to) { std::memcpy(to, from, kCols * sizeof *to); }
    static void widen(uint32_t*) {}
    static Floats add_pair(Floats sum, const uint32_t* weights, const Number* x) {
        return dot_pairs(sum, load_bytes(weights), load_int32(x));
    }
    static void store(uint16_t* to, Floats sums, int count) { store_bfloat16(to, sums, count); }
};

struct Float16 {
    using Number = float;
    static constexpr int kWords = 2;
    static void read(const uint16_t* from, Number* to) {
        for (int i = 0; i < kCols; i += kRows) store_floats(to + i, load_halves(from + i), kRows);
    }
    // From the back, for the panel stands at the front of its own place.
    static void widen(uint32_t* panel) {
        for (int pair = kCols / 2 - 1; pair >= 0; --pair) {
            const Bytes words = load_bytes(panel + pair * kRows);
            float* to = reinterpret_cast<float*>(panel) + 2 * pair * kRows;
            store_floats(to, lower_halves(words), kRows);
            store_floats(to + kRows, upper_halves(words), kRows);
        }
    }
    static Floats add_pair(Floats sum, const uint32_t* weights, const Number* x) {
        const float* from = reinterpret_cast<const float*>(weights);
        sum = multiply_add(load_floats(from), same_float(x[0]), sum);
        return multiply_add(load_floats(from + kRows), same_float(x[1]), sum);
    }
    static void store(uint16_t* to, Floats sums, int count) { store_halves(to, sums, count); }
};

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// Memory of this thread, kept between calls; null when there is none.
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

// Turns pairs [16 rows][16 pairs] from column `col` on into [16 pairs][16 rows]. Rows beyond the
// last are a copy of it; columns beyond the last are zeros. Numbers `ahead` of these are asked for.
[[gnu::always_inline]] inline void turn(const AutotpDense& weight, int64_t row, int64_t col, int64_t ahead, uint32_t* to) {
    const uint32_t* rows[kRows];
    alignas(64) uint16_t padded[kRows][kCols];
    for (int i = 0; i < kRows; ++i) {
        const int64_t index = std::min<int64_t>(row + i, weight.rows - 1);
        const uint16_t* from = weight.numbers + index * weight.stride + col;
        if (weight.cols - col < kCols) {
            std::memset(padded[i], 0, sizeof padded[i]);
            std::memcpy(padded[i], from, (weight.cols - col) * sizeof *from);
            from = padded[i];
        } else {
            // Into the second cache: rows a power of two apart would push each other out of the
            // first.
            prefetch_far(from + ahead);
        }
        rows[i] = reinterpret_cast<const uint32_t*>(from);
    }
    transpose_words(rows, to, kRows);
}

// The numbers of `count` tokens in the order of add_products: [cols / 32, tokens, 32].
template <class T>
void pack(const uint16_t* x, int64_t x_stride, int64_t count, int64_t cols,
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

// Adds to sums[m] the products of `panels` panels with token m of `count`.
template <class T, int kTokens>
void add_products(const uint32_t* panel, int64_t panels, const typename T::Number* x, int64_t count,
                  Floats* to) {
    if constexpr (kTokens > 1) {
        if (count < kTokens) return add_products<T, kTokens - 1>(panel, panels, x, count, to);
    }
    Floats sums[kTokens];
    for (int m = 0; m < kTokens; ++m) sums[m] = to[m];
    for (int64_t i = 0; i < panels; ++i, x += kTokens * kCols) {
        for (int pair = 0; pair < kCols / 2; ++pair, panel += T::kWords * kRows) {
            for (int m = 0; m < kTokens; ++m) {
                sums[m] = T::add_pair(sums[m], panel, x + m * kCols + 2 * pair);
            }
        }
    }
    for (int m = 0; m < kTokens; ++m) to[m] = sums[m];
}

// Multiplies at most kMostTokens tokens, packed in chunks of kMaxTokens, by 16 rows from `row` on.
template <class T, int kPanels>
void multiply_rows(const AutotpDense& weight, int64_t row, const typename T::Number* x,
                   int64_t tokens, uint16_t* out, int64_t out_stride) {
    static_assert(piece_of(1) % (kPanels * kCols) == 0);
    const int64_t piece = piece_of(weight.cols);
    const int64_t all_panels = (weight.cols + kCols - 1) / kCols;
    constexpr int kSize = T::kWords * kPanel;
    alignas(64) uint32_t panels[kPanels * kSize];
    Floats sums[kMostTokens], totals[kMostTokens];
    for (int64_t m = 0; m < tokens; ++m) sums[m] = same_float(0);
    // Past the end of these rows the next 16 follow.
    const int64_t skipped = kRows * weight.stride - weight.cols;
    int64_t ahead = kAhead + kAhead / weight.cols * skipped;
    int64_t row_end = weight.cols - kAhead % weight.cols;
    for (int64_t first = 0; first < all_panels; first += kPanels) {
        const int64_t count = std::min<int64_t>(kPanels, all_panels - first);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t col = (first + i) * kCols;
            if (col >= row_end) {
                ahead += skipped;
                row_end += weight.cols;
            }
            turn(weight, row, col, ahead, panels + i * kSize);
            T::widen(panels + i * kSize);
        }
        for (int64_t m = 0; m < tokens; m += kMaxTokens) {
            const int64_t together = std::min<int64_t>(kMaxTokens, tokens - m);
            const auto* chunk = x + (m * all_panels + first * together) * kCols;
            add_products<T, kMaxTokens>(panels, count, chunk, together, sums + m);
        }
        const int64_t end = (first + count) * kCols;
        if (end % piece == 0 || first + count == all_panels) {
            for (int64_t m = 0; m < tokens; ++m) {
                totals[m] = end <= piece ? sums[m] : add(totals[m], sums[m]);
                sums[m] = same_float(0);
            }
        }
    }
    const int rows = static_cast<int>(std::min<int64_t>(kRows, weight.rows - row));
    for (int64_t m = 0; m < tokens; ++m) {
        T::store(out + m * out_stride + row, totals[m], rows);
    }
}

int64_t count_groups(const AutotpDense& weight) { return (weight.rows + kRows - 1) / kRows; }

template <class T>
int multiply(const AutotpDense* const* weights, int64_t count, const uint16_t* x, int64_t x_stride,
             uint16_t* out, int64_t tokens, int64_t threads) {
    int64_t rows = 0, groups = 0;
    for (int64_t i = 0; i < count; ++i) {
        rows += weights[i]->rows;
        groups += count_groups(*weights[i]);
    }
    using Number = typename T::Number;
    const int64_t cols = weights[0]->cols, padded = (cols + kCols - 1) / kCols * kCols;
    const int64_t at_once = std::min(tokens, kMostTokens);
    Number* packed = static_cast<Number*>(scratch(at_once * padded * sizeof(Number)));
    if (!packed) return 1;
    for (int64_t start = 0; start < tokens; start += kMostTokens) {
        const int64_t some = std::min(kMostTokens, tokens - start);
        for (int64_t m = 0; m < some; m += kMaxTokens) {
            pack<T>(x + (start + m) * x_stride, x_stride, std::min<int64_t>(kMaxTokens, some - m),
                    cols, packed + m * padded);
        }
        const int64_t share = std::max<int64_t>(1, groups / (threads * 8));
        // Dynamic, because a core may be busy with something else; who computes a row does not
        // change it.
#pragma omp parallel for num_threads(threads) schedule(dynamic, share) if (threads > 1)
        for (int64_t index = 0; index < groups; ++index) {
            const AutotpDense* const* weight = weights;
            int64_t group = index, first_col = 0;
            for (; group >= count_groups(**weight); ++weight) {
                group -= count_groups(**weight);
                first_col += (*weight)->rows;
            }
            const auto multiply_some =
                some > kMaxTokens ? multiply_rows<T, kManyPanels> : multiply_rows<T, 1>;
            multiply_some(**weight, group * kRows, packed, some, out + start * rows + first_col,
                          rows);
        }
    }
    return 0;
}

}  // namespace

extern "C" {

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

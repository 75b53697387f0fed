// y = x * weight^T with bfloat16 weights as they are stored, for a few tokens.
//
// Runs on every rank, in the thread that calls and in the OpenMP threads it shares with torch. Each
// result is summed as oneDNN sums it for many tokens, in pieces of 1,024 columns and in each from
// the first pair to the last: so it does not matter which of the two multiplies a token. The
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
constexpr int kPanel = kRows * kCols / 2;
// Panels made before tokens are multiplied with them: one while memory sets the pace, so that
// reading goes on meanwhile; for many tokens as many as stay in the nearest cache.
constexpr int kManyPanels = 4;
constexpr int64_t kPiece = 1024;    // columns that are summed apart
constexpr int64_t kMostTokens = 64;  // for which a weight is turned once
constexpr int64_t kAhead = 512;     // columns asked for before they are needed

struct Free {
    void operator()(uint16_t* memory) const { std::free(memory); }
};

// Memory of this thread, kept between calls; null when there is none.
uint16_t* scratch(size_t bytes) {
    static thread_local std::unique_ptr<uint16_t, Free> memory;
    static thread_local size_t size = 0;
    if (bytes > size) {
        size = 0;
        memory.reset();
        memory.reset(static_cast<uint16_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
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
void pack(const uint16_t* x, int64_t x_stride, int64_t count, int64_t cols, uint16_t* to) {
    for (int64_t col = 0; col < cols; col += kCols) {
        const int64_t size = std::min<int64_t>(kCols, cols - col);
        for (int64_t m = 0; m < count; ++m, to += kCols) {
            std::memset(to, 0, kCols * sizeof *to);
            std::memcpy(to, x + m * x_stride + col, size * sizeof *to);
        }
    }
}

// Adds to sums[m] the products of `panels` panels with token m of `count`.
template <int kTokens>
void add_products(const uint32_t* panel, int64_t panels, const uint16_t* x, int64_t count,
                  Floats* to) {
    if constexpr (kTokens > 1) {
        if (count < kTokens) return add_products<kTokens - 1>(panel, panels, x, count, to);
    }
    Floats sums[kTokens];
    for (int m = 0; m < kTokens; ++m) sums[m] = to[m];
    for (int64_t i = 0; i < panels; ++i, x += kTokens * kCols) {
        for (int pair = 0; pair < kCols / 2; ++pair, panel += kRows) {
            const Bytes weights = load_bytes(panel);
            for (int m = 0; m < kTokens; ++m) {
                sums[m] = dot_pairs(sums[m], weights, load_int32(x + m * kCols + 2 * pair));
            }
        }
    }
    for (int m = 0; m < kTokens; ++m) to[m] = sums[m];
}

// Multiplies at most kMostTokens tokens, packed in chunks of kMaxTokens, by 16 rows from `row` on.
template <int kPanels>
void multiply_rows(const AutotpDense& weight, int64_t row, const uint16_t* x, int64_t tokens,
                   uint16_t* out, int64_t out_stride) {
    static_assert(kPiece % (kPanels * kCols) == 0);
    const int64_t all_panels = (weight.cols + kCols - 1) / kCols;
    alignas(64) uint32_t panels[kPanels * kPanel];
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
            turn(weight, row, col, ahead, panels + i * kPanel);
        }
        for (int64_t m = 0; m < tokens; m += kMaxTokens) {
            const int64_t together = std::min<int64_t>(kMaxTokens, tokens - m);
            const uint16_t* chunk = x + (m * all_panels + first * together) * kCols;
            add_products<kMaxTokens>(panels, count, chunk, together, sums + m);
        }
        const int64_t end = (first + count) * kCols;
        if (end % kPiece == 0 || first + count == all_panels) {
            for (int64_t m = 0; m < tokens; ++m) {
                totals[m] = end <= kPiece ? sums[m] : add(totals[m], sums[m]);
                sums[m] = same_float(0);
            }
        }
    }
    const int rows = static_cast<int>(std::min<int64_t>(kRows, weight.rows - row));
    for (int64_t m = 0; m < tokens; ++m) {
        store_bfloat16(out + m * out_stride + row, totals[m], rows);
    }
}

int64_t count_groups(const AutotpDense& weight) { return (weight.rows + kRows - 1) / kRows; }

}  // namespace

extern "C" {

// Multiplies `tokens` rows of bfloat16 `x`, each `x_stride` numbers after the one before, by `count`
// weights of as many columns, into bfloat16 `out` [tokens, rows of all weights]. Returns 0, or 1
// when there is no memory. The type is a parameter because autotp_linear has it.
int autotp_dense_linear(const AutotpDense* const* weights, int64_t count, const void* x,
                        int64_t x_stride, void* out, int64_t tokens, int64_t /*dtype*/,
                        int64_t threads) {
    int64_t rows = 0, groups = 0;
    for (int64_t i = 0; i < count; ++i) {
        rows += weights[i]->rows;
        groups += count_groups(*weights[i]);
    }
    const int64_t cols = weights[0]->cols, padded = (cols + kCols - 1) / kCols * kCols;
    uint16_t* packed = scratch(tokens * padded * sizeof(uint16_t));
    if (!packed) return 1;
    for (int64_t m = 0; m < tokens; m += kMaxTokens) {
        pack(static_cast<const uint16_t*>(x) + m * x_stride, x_stride,
             std::min<int64_t>(kMaxTokens, tokens - m), cols, packed + m * padded);
    }
    const int64_t share = std::max<int64_t>(1, groups / (threads * 8));
    // Dynamic, because a core may be busy with something else; who computes a row does not change
    // it.
#pragma omp parallel for num_threads(threads) schedule(dynamic, share) if (threads > 1)
    for (int64_t index = 0; index < groups; ++index) {
        const AutotpDense* const* weight = weights;
        int64_t group = index, first_col = 0;
        for (; group >= count_groups(**weight); ++weight) {
            group -= count_groups(**weight);
            first_col += (*weight)->rows;
        }
        for (int64_t m = 0; m < tokens; m += kMostTokens) {
            const int64_t some = std::min(kMostTokens, tokens - m);
            const auto multiply = some > kMaxTokens ? multiply_rows<kManyPanels> : multiply_rows<1>;
            uint16_t* to = static_cast<uint16_t*>(out) + m * rows + first_col;
            multiply(**weight, group * kRows, packed + m * padded, some, to, rows);
        }
    }
    return 0;
}

}  // extern "C"

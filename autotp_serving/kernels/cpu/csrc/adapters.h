// What LoRA adapters add to a product: up * (down * x) * scale, for the tokens of those who have one.
//
// The sums are those of a token alone, in one order, whatever runs beside it and in however many
// threads. For layer_ops.cpp, after the vectors.
#pragma once

#include <algorithm>
#include <cstdint>

// An adapter's two matrices for one of the layers that a product joins.
struct AutotpAdapterPart {
    const uint16_t* down;  // [rank, cols] bfloat16, or null where it has none
    const uint16_t* up;    // [num_rows / 16, rank / 2, 16, 2], the rank rounded up
    int64_t rank, first_row, num_rows;
    float scale;
};

// Which tokens of a step have an adapter, as kernels/cpu/adapters.py describes it.
struct AutotpAdapterRuns {
    const int64_t* runs;  // [count, 3]: first token, tokens, slot
    int64_t count;
    float* low_rank;  // [tokens, stride], for down * x of all parts
    int64_t stride;
};

namespace {

constexpr int64_t kTokensAtOnce = 4;

// Numbers asked for before they are needed. An adapter's matrices lie one behind the other, and
// are read from front to back: the processor's own reading ahead ends with each 4 KiB.
constexpr int64_t kAhead = 1536;

// sums[token] = scale * dot(weight, x[token]) for kTokens tokens `x_stride` apart; `cols` is a
// multiple of 16.
template <int kTokens>
void dot_tokens(const uint16_t* weight, const uint16_t* x, int64_t x_stride, int64_t cols,
                float scale, float* sums, int64_t sums_stride) {
    constexpr int kPairs = 32;  // numbers of a vector of pairs
    Floats even[kTokens], odd[kTokens];
    for (int token = 0; token < kTokens; ++token) even[token] = odd[token] = same_float(0);
    const auto add_pairs = [&](Floats* to, int64_t from) {
        prefetch_near(weight + from + kAhead);
        const Bytes weights = load_bytes(weight + from);
        for (int token = 0; token < kTokens; ++token) {
            to[token] = dot_pairs(to[token], weights, load_bytes(x + token * x_stride + from));
        }
    };
    int64_t i = 0;
    for (; i + 2 * kPairs <= cols; i += 2 * kPairs) {
        add_pairs(even, i);
        add_pairs(odd, i + kPairs);
    }
    if (i + kPairs <= cols) {
        add_pairs(even, i);
        i += kPairs;
    }
    if (i < cols) {
        const Floats last = load_bfloat16(weight + i);
        for (int token = 0; token < kTokens; ++token) {
            odd[token] = multiply_add(last, load_bfloat16(x + token * x_stride + i), odd[token]);
        }
    }
    for (int token = 0; token < kTokens; ++token) {
        sums[token * sums_stride] = scale * sum_lanes(add(even[token], odd[token]));
    }
}

// out[token] += sum over the rank of low_rank[token] * tile, 16 numbers of kTokens tokens.
template <int kTokens>
void add_tile(const uint16_t* tile, int64_t rank, const float* low_rank, int64_t low_rank_stride,
              uint16_t* out, int64_t out_stride) {
    Floats even[kTokens], odd[kTokens];
    for (int token = 0; token < kTokens; ++token) even[token] = odd[token] = same_float(0);
    const auto add_rows = [&](Floats* to, Floats weights, int64_t row) {
        for (int token = 0; token < kTokens; ++token) {
            const Floats factor = same_float(low_rank[token * low_rank_stride + row]);
            to[token] = multiply_add(factor, weights, to[token]);
        }
    };
    for (int64_t row = 0; row < rank; row += 2) {
        prefetch_near(tile + row * 16 + kAhead);
        const Bytes pairs = load_bytes(tile + row * 16);
        add_rows(even, lower_bfloat16(pairs), row);
        if (row + 1 < rank) add_rows(odd, upper_bfloat16(pairs), row + 1);
    }
    for (int token = 0; token < kTokens; ++token) {
        uint16_t* to = out + token * out_stride;
        store_bfloat16(to, add(load_bfloat16(to), add(even[token], odd[token])), 16);
    }
}

// Calls `four(token)` or `one(token)` for the tokens of block `block` of a run.
template <typename Four, typename One>
void for_block(int64_t block, int64_t first, int64_t count, const Four& four, const One& one) {
    const int64_t begin = block * kTokensAtOnce, end = std::min(begin + kTokensAtOnce, count);
    if (end - begin == kTokensAtOnce) return four(first + begin);
    for (int64_t token = begin; token < end; ++token) one(first + token);
}

// Adds to `out` [tokens, rows] what the adapters of `x` [tokens, cols] make of it.
void add_adapters(const AutotpAdapterPart* adapters, int64_t num_parts,
                  const AutotpAdapterRuns& runs, const uint16_t* x, int64_t cols, uint16_t* out,
                  int64_t rows, int64_t threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (int64_t number = 0; number < runs.count; ++number) {
            const int64_t* run = runs.runs + 3 * number;
            const int64_t first = run[0], count = run[1];
            const int64_t blocks = (count + kTokensAtOnce - 1) / kTokensAtOnce;
            float* place = runs.low_rank;
            for (int64_t index = 0; index < num_parts; ++index) {
                const AutotpAdapterPart& part = adapters[run[2] * num_parts + index];
                if (!part.down) continue;
#pragma omp for schedule(static) nowait
                for (int64_t item = 0; item < blocks * part.rank; ++item) {
                    const int64_t row = item % part.rank;
                    const uint16_t* weight = part.down + row * cols;
                    float* sums = place + row;
                    for_block(
                        item / part.rank, first, count,
                        [&](int64_t token) {
                            dot_tokens<kTokensAtOnce>(weight, x + token * cols, cols, cols,
                                                      part.scale, sums + token * runs.stride,
                                                      runs.stride);
                        },
                        [&](int64_t token) {
                            dot_tokens<1>(weight, x + token * cols, cols, cols, part.scale,
                                          sums + token * runs.stride, runs.stride);
                        });
                }
                place += part.rank;
            }
        }
#pragma omp barrier
        for (int64_t number = 0; number < runs.count; ++number) {
            const int64_t* run = runs.runs + 3 * number;
            const int64_t first = run[0], count = run[1];
            const int64_t blocks = (count + kTokensAtOnce - 1) / kTokensAtOnce;
            const float* place = runs.low_rank;
            for (int64_t index = 0; index < num_parts; ++index) {
                const AutotpAdapterPart& part = adapters[run[2] * num_parts + index];
                if (!part.down) continue;
                const int64_t tiles = part.num_rows / 16, tile_size = (part.rank + 1) / 2 * 32;
#pragma omp for schedule(static) nowait
                for (int64_t item = 0; item < blocks * tiles; ++item) {
                    const int64_t column = item % tiles;
                    const uint16_t* tile = part.up + column * tile_size;
                    uint16_t* to = out + part.first_row + column * 16;
                    for_block(
                        item / tiles, first, count,
                        [&](int64_t token) {
                            add_tile<kTokensAtOnce>(tile, part.rank, place + token * runs.stride,
                                                    runs.stride, to + token * rows, rows);
                        },
                        [&](int64_t token) {
                            add_tile<1>(tile, part.rank, place + token * runs.stride, runs.stride,
                                        to + token * rows, rows);
                        });
                }
                place += part.rank;
            }
        }
    }
}

}  // namespace

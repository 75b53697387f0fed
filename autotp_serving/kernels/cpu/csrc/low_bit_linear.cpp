// y = x * weight^T with a low-bit weight: the C interface, and the loops over rows and tokens.
//
// Runs on every rank, in the thread that calls and in the OpenMP threads it shares with torch.
// One library per format, for short compiling: -DFORMAT="4, 0, Kind::kCodes, Scale::kHalf, false"
// names it as the arguments of Format, -DISA_VECTORS="vectors_....h" and -DISA_TILES="tiles_....h"
// the instructions.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "activations.h"
#include "codes.h"
#include "multiply.h"

namespace {

using F = Format<FORMAT>;
using Block = std::conditional_t<F::kKind == Kind::kPairs, PairBlock, ByteBlock>;

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1 };

// From this many tokens on, a group's codes are decoded once for all of them; plain codes come as
// fast as decoded ones.
constexpr int64_t kWorthDecoding =
    F::kKind == Kind::kCodes && F::kHigh == 0 ? INT64_MAX : 2 * kMaxTokens;
// Tokens made ready at once: their numbers stay near while the weights pass by. Where each group is
// decoded for them, many share that; else as many are best as take a fifth of a 1 MiB L2 cache, or
// half of it where two groups share what is fetched.
constexpr int64_t kTokensAtOnce = F::kKind == Kind::kPairs ? 128 : 256;
constexpr int64_t kBytesAtOnce = kInPairs<F> ? 8 << 16 : 3 << 16;
// From this many tokens on, groups are multiplied two at a time; with fewer, eight tokens at a time
// wait less for the weights.
constexpr int64_t kWorthPairing = 64;
// From this many tokens on, AMX multiplies faster, though it always multiplies 16.
constexpr int64_t kWorthTiles = 8;
// Below this many activations a second thread costs more than it helps in making them ready.
constexpr int64_t kWorthSharing = 1 << 15;

}  // namespace

// A weight as kernels/cpu/linear.py describes it; the same fields in the same order.
struct AutotpWeight {
    int64_t rows, cols;
    const uint8_t* codes;
    const uint8_t* high;
    const uint8_t* scales;
    const uint16_t* mins;
    // The rows beyond the last multiple of 16, as a group of their own with 16 rows.
    const uint8_t* last_codes;
    const uint8_t* last_high;
    const uint8_t* last_scales;
    const uint16_t* last_mins;
    const uint8_t* table;  // 16 bytes, or 128 upper and 128 lower bytes of bfloat16
    float unit;
    int32_t offset;
};

namespace {

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

// Memory of this thread for one purpose, kept between calls.
template <class Purpose>
void* scratch(size_t bytes) {
    static thread_local std::unique_ptr<void, Free> memory;
    static thread_local size_t size = 0;
    if (bytes > size) {
        memory.reset();
        memory.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        if (!memory) throw std::bad_alloc();
        size = bytes;
    }
    return memory.get();
}

// One product of a call; those of several weights have the same columns and the same `x`.
struct Call {
    const AutotpWeight& weight;
    const void* x;
    int64_t x_stride;
    void* out;
    int64_t out_stride, first_col;
    int64_t dtype;
    int threads;
    int64_t groups() const { return (weight.rows + kRows - 1) / kRows; }
    int64_t whole_groups() const { return weight.rows / kRows; }
    int64_t tiles() const { return (weight.cols + kBlock - 1) / kBlock; }
};

Group find_group(const AutotpWeight& weight, int64_t index, int64_t tiles) {
    constexpr int64_t kScaleBytes =
        F::kScale == Scale::kHalf ? 2 : F::kScale == Scale::kFloat ? 4 : 0;
    if ((index + 1) * kRows > weight.rows) {
        return {weight.last_codes, weight.last_high, weight.last_scales, weight.last_mins, nullptr};
    }
    const int64_t before = index * tiles;
    return {weight.codes + before * F::kLowBytes, weight.high + before * F::kHighBytes,
            weight.scales + before * kRows * kScaleBytes, weight.mins + before * kRows,
            nullptr};
}

void prepare_token(const Call& call, int64_t token, int64_t place, Block* x) {
    const int64_t tiles = call.tiles();
    Block* chunk = x + place / kChunk * tiles;
    float values[kBlock];
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t from = token * call.x_stride + tile * kBlock;
        const int64_t count = std::min<int64_t>(kBlock, call.weight.cols - tile * kBlock);
        if (call.dtype == kFloat32) {
            read_block(static_cast<const float*>(call.x) + from, count, values);
        } else {
            read_block(static_cast<const uint16_t*>(call.x) + from, count, values);
        }
        prepare(chunk[tile], place % kChunk, values, call.weight.unit, call.weight.offset);
    }
}

void store(const Call& call, int64_t token, int64_t row, Floats sums) {
    const int64_t to = token * call.out_stride + call.first_col + row;
    const int count = static_cast<int>(std::min<int64_t>(kRows, call.weight.rows - row));
    if (call.dtype == kFloat32) {
        store_floats(static_cast<float*>(call.out) + to, sums, count);
    } else {
        store_bfloat16(static_cast<uint16_t*>(call.out) + to, sums, count);
    }
}

// Multiplies `count` tokens, at most 8, that stand at `place` in `x` and are `token` and the
// next ones of the call.
template <int kTokens, bool kDecoded>
void multiply_tokens(const Call& call, const Group& group, int64_t row, const Block* x,
                     int64_t place, int64_t token, int64_t count, const Tables& tables) {
    if constexpr (kTokens > 1) {
        if (count < kTokens) {
            multiply_tokens<kTokens - 1, false>(call, group, row, x, place, token, count, tables);
            return;
        }
    }
    Floats sums[kTokens];
    for (int m = 0; m < kTokens; ++m) sums[m] = same_float(0);
    const int64_t tiles = call.tiles();
    multiply<F, kTokens, kDecoded>(group, x + place / kChunk * tiles, place % kChunk, tiles, tables, sums);
    for (int m = 0; m < kTokens; ++m) store(call, token + m, row, sums[m]);
}

// The same for two whole groups from `row` on and at most four tokens, which share a chunk. A
// template of the block, so that formats which do not come in pairs have none of it.
template <int kTokens, class X>
void multiply_pair_tokens(const Call& call, const Group (&groups)[2], int64_t row, const X* x,
                          int64_t place, int64_t token, int64_t count) {
    if constexpr (kTokens > 1) {
        if (count < kTokens) {
            multiply_pair_tokens<kTokens - 1>(call, groups, row, x, place, token, count);
            return;
        }
    }
    Floats sums[2][kTokens];
    const int64_t tiles = call.tiles();
    multiply_pair<F, kTokens>(groups, x + place / kChunk * tiles, place % kChunk, tiles, sums);
    for (int g = 0; g < 2; ++g) {
        for (int m = 0; m < kTokens; ++m) store(call, token + m, row + g * kRows, sums[g][m]);
    }
}

// Multiplies `count` tokens, made ready at `x` and from `start` on in the call, with two groups.
template <class X>
void multiply_two_groups(const Call& call, int64_t index, const X* x, int64_t start, int64_t count,
                         const Tables& tables) {
    const int64_t tiles = call.tiles();
    Group groups[2] = {find_group(call.weight, index, tiles),
                       find_group(call.weight, index + 1, tiles)};
    if constexpr (F::kKind == Kind::kPairs) {
        const int64_t size = tiles * kDecodedBytes<F>;
        uint8_t* decoded = static_cast<uint8_t*>(scratch<Group>(2 * size));
        for (Group& group : groups) {
            decode<F>(group, tiles, tables, 0, decoded);
            group.decoded = decoded;
            decoded += size;
        }
    }
    for (int64_t place = 0; place < count; place += kPairTokens) {
        multiply_pair_tokens<kPairTokens>(call, groups, index * kRows, x, place, start + place,
                                          count - place);
    }
}

// Multiplies 16 tokens of a chunk, of which `count` are wanted.
void multiply_sixteen(const Call& call, const Group& group, int64_t row, const Block* x,
                      int64_t place, int64_t token, int64_t count) {
    Floats sums[kChunk];
    multiply_chunk<F>(group, x + place / kChunk * call.tiles(), call.tiles(), sums);
    for (int64_t m = 0; m < std::min<int64_t>(count, kChunk); ++m) {
        store(call, token + m, row, sums[m]);
    }
}

// Multiplies `count` tokens, made ready at `x` and from `start` on in the call, with 16 rows.
void multiply_rows(const Call& call, int64_t index, const Block* x, int64_t start, int64_t count,
                   const Tables& tables, bool by_tiles) {
    const int64_t tiles = call.tiles(), row = index * kRows;
    Group group = find_group(call.weight, index, tiles);
    if (by_tiles || count >= kWorthDecoding) {
        uint8_t* decoded = static_cast<uint8_t*>(scratch<Group>(tiles * kDecodedBytes<F>));
        decode<F>(group, tiles, tables, by_tiles ? call.weight.offset : 0, decoded);
        group.decoded = decoded;
    }
    if (by_tiles) {
        for (int64_t place = 0; place < count; place += kChunk) {
            multiply_sixteen(call, group, row, x, place, start + place, count - place);
        }
        return;
    }
    for (int64_t place = 0; place < count; place += kMaxTokens) {
        const auto multiply_some = group.decoded && count - place >= kMaxTokens
                                       ? multiply_tokens<kMaxTokens, true>
                                       : multiply_tokens<kMaxTokens, false>;
        multiply_some(call, group, row, x, place, start + place, count - place, tables);
    }
}

void run(const Call* calls, int64_t count_calls, int64_t tokens) {
    const Call& call = calls[0];
    const AutotpWeight& weight = call.weight;
    const int64_t chunk_bytes = call.tiles() * sizeof(Block);
    const int64_t most = kWorthDecoding < INT64_MAX
                             ? kTokensAtOnce
                             : std::max<int64_t>(1, kBytesAtOnce / chunk_bytes) * kChunk;
    // In equal shares: a few tokens at the end would need all weights again.
    const int64_t shares = std::max<int64_t>(1, (tokens + most - 1) / most);
    const int64_t at_once = (tokens + shares * kChunk - 1) / (shares * kChunk) * kChunk;
    const int64_t chunks = (std::min(tokens, at_once) + kChunk - 1) / kChunk;
    Block* x = static_cast<Block*>(scratch<Block>(chunks * chunk_bytes));
    for (int64_t start = 0; start < tokens; start += at_once) {
        const int64_t count = std::min(at_once, tokens - start);
        const bool by_tiles = kHasTiles && count >= kWorthTiles && may_use_tiles();
        const bool in_pairs = kInPairs<F> && !by_tiles && count >= kWorthPairing;
        const int64_t together = in_pairs ? 2 : 1;
        const auto count_pieces = [&](const Call& part) {
            return (part.groups() + together - 1) / together;
        };
        int64_t pieces = 0;
        for (int64_t i = 0; i < count_calls; ++i) pieces += count_pieces(calls[i]);
        const int share = static_cast<int>(std::max<int64_t>(1, pieces / (call.threads * 8)));
#pragma omp parallel for num_threads(call.threads) if (count * weight.cols >= kWorthSharing)
        for (int64_t place = 0; place < count; ++place) {
            prepare_token(call, start + place, place, x);
        }
        // Dynamic, because a core may be busy with something else; who computes a row does not
        // change it.
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
        {
            Tables tables{};
            if constexpr (F::kKind == Kind::kTable) tables.bytes = load_table(weight.table);
            if constexpr (F::kKind == Kind::kPairs) {
                tables.pairs = load_pair_table(weight.table, weight.table + 128);
            }
            if (by_tiles) start_tiles();
#pragma omp for schedule(dynamic, share)
            for (int64_t index = 0; index < pieces; ++index) {
                const Call* part = calls;
                int64_t piece = index;
                for (; piece >= count_pieces(*part); ++part) piece -= count_pieces(*part);
                const int64_t first = piece * together;
                if constexpr (kInPairs<F>) {
                    if (in_pairs && first + 2 <= part->whole_groups()) {
                        multiply_two_groups(*part, first, x, start, count, tables);
                        continue;
                    }
                }
                const int64_t end = std::min(first + together, part->groups());
                for (int64_t group = first; group < end; ++group) {
                    multiply_rows(*part, group, x, start, count, tables, by_tiles);
                }
            }
            if (by_tiles) stop_tiles();
        }
    }
}

}  // namespace

extern "C" {

// Multiplies `tokens` rows of `x`, each `x_stride` numbers after the one before, by `count` weights
// of as many columns, into `out` [tokens, rows of all weights]; both have the type `dtype`. Returns
// 0, or 1 when there is no memory.
int autotp_linear(const AutotpWeight* const* weights, int64_t count, const void* x,
                  int64_t x_stride, void* out, int64_t tokens, int64_t dtype, int64_t threads) {
    try {
        int64_t out_stride = 0, first_col = 0;
        for (int64_t i = 0; i < count; ++i) out_stride += weights[i]->rows;
        std::vector<Call> calls;
        for (int64_t i = 0; i < count; ++i) {
            calls.push_back({*weights[i], x, x_stride, out, out_stride, first_col, dtype,
                             static_cast<int>(threads)});
            first_col += weights[i]->rows;
        }
        run(calls.data(), count, tokens);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // extern "C"

// What a decoder layer does between its matrices, on bfloat16: norm, rotation, gated activation.
//
// Runs on every rank, in the thread that calls and, for many tokens, in the OpenMP threads it
// shares with torch. Each operation rounds where transformers' Llama rounds, except inside the
// rotation, which is rounded once. A token's result depends on that token alone.
#include <omp.h>

#include <cmath>
#include <cstdint>

#include ISA_VECTORS

#include "adapters.h"
#include "bfloat16.h"
#include "exponential.h"
#include "kv_layout.h"
#include "paged_attention.h"

// One call of autotp_rotate_and_store, as kernels/cpu/layer_ops.py describes it.
struct AutotpRotation {
    uint16_t* qkv;  // [tokens, heads + 2 * kv_heads, head_dim]; queries and keys are rotated in place
    const uint16_t* cos;  // [tokens, head_dim]
    const uint16_t* sin;
    const int64_t* slots;  // [tokens]
    AutotpPools pools;
    const uint16_t* query_norm;  // [head_dim] each, or null
    const uint16_t* key_norm;
    int64_t tokens, heads, kv_heads, head_dim;
    float epsilon;
};

// A product of low_bit_linear.cpp: a function of some library, and the weights it takes.
struct AutotpProduct {
    int (*multiply)(const void* const* weights, int64_t count, const void* x, int64_t x_stride,
                    void* out, int64_t tokens, int64_t dtype, int64_t threads);
    const void* const* weights;
    int64_t count, rows, cols;
    const uint16_t* bias;  // [rows], or null
    const AutotpAdapterPart* adapters;  // [slots, num_parts], or null
    int64_t num_parts;
};

// A decoder layer, as kernels/cpu/layers.py describes it.
struct AutotpLayer {
    AutotpProduct qkv, output, gate_up, down;
    const uint16_t* input_norm;
    const uint16_t* mlp_norm;
    float input_epsilon, mlp_epsilon;
    AutotpRotation rotation;  // without what belongs to a step
    float scaling;
    int64_t window;
};

// What the layers of one step share, as kernels/cpu/layers.py describes it.
struct AutotpStep {
    int64_t tokens, threads;
    uint16_t* hidden;       // [tokens, size]
    uint16_t* out;          // [tokens, size], what the next norm adds to `hidden` first
    const uint16_t* cos;    // [tokens, head_dim]
    const uint16_t* sin;
    const int64_t* slots;
    AutotpAttention* attention;
    int (*attend)(const AutotpAttention* call, int64_t threads);
    uint16_t* normed;     // [tokens, size]
    uint16_t* joined;     // [tokens, rows of qkv or of gate_up]
    uint16_t* narrowed;   // [tokens, columns of output or of down]
    const AutotpAdapterRuns* adapters;  // null where no token has one
};

namespace {

constexpr int kLanes = 16;
// Below this many numbers a second thread costs more than it helps.
constexpr int64_t kWorthSharing = 1 << 16;

// to = weight * (x / rms(x)), for `count` numbers, a multiple of 16.
inline void normalize(const uint16_t* x, const uint16_t* weight, uint16_t* to, int64_t count,
                      float epsilon) {
    Floats squares = same_float(0);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats value = load_bfloat16(x + i);
        squares = multiply_add(value, value, squares);
    }
    const float mean = sum_lanes(squares) / static_cast<float>(count);
    const Floats inverse = same_float(1.0f / std::sqrt(mean + epsilon));
    for (int64_t i = 0; i < count; i += kLanes) {
        const Floats scaled = round_to_bfloat16(multiply(load_bfloat16(x + i), inverse));
        store_bfloat16(to + i, multiply(scaled, load_bfloat16(weight + i)), kLanes);
    }
}

// Rotates a head's pairs (i, i + size / 2) by the angles of `cos` and `sin`, in place.
inline void rotate(uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
        const Floats low = load_bfloat16(x + i), high = load_bfloat16(x + half + i);
        const Floats minus = multiply(high, same_float(-1));
        const Floats low_turned = multiply_add(minus, load_bfloat16(sin + i),
                                               multiply(low, load_bfloat16(cos + i)));
        const Floats high_turned = multiply_add(low, load_bfloat16(sin + half + i),
                                                multiply(high, load_bfloat16(cos + half + i)));
        store_bfloat16(x + i, low_turned, kLanes);
        store_bfloat16(x + half + i, high_turned, kLanes);
    }
}

}  // namespace

namespace {

int multiply(const AutotpProduct& product, const uint16_t* x, uint16_t* out,
             const AutotpStep& step) {
    const int64_t tokens = step.tokens, threads = step.threads;
    constexpr int64_t kBFloat16 = 1;  // of low_bit_linear.cpp's types
    if (product.multiply(product.weights, product.count, x, product.cols, out, tokens, kBFloat16,
                         threads)) {
        return 1;
    }
    if (product.bias) {
        for (int64_t token = 0; token < tokens; ++token) {
            uint16_t* row = out + token * product.rows;
            for (int64_t i = 0; i < product.rows; ++i) {
                row[i] = round_bfloat16(as_float(static_cast<uint32_t>(row[i]) << 16) +
                                        as_float(static_cast<uint32_t>(product.bias[i]) << 16));
            }
        }
    }
    if (step.adapters && product.adapters) {
        add_adapters(product.adapters, product.num_parts, *step.adapters, x, product.cols, out,
                     product.rows, threads);
    }
    return 0;
}

}  // namespace

extern "C" {

// Adds what adapters make of `x` [tokens, cols] to `out` [tokens, rows]; multiples of 16.
void autotp_add_adapters(const AutotpAdapterPart* adapters, int64_t num_parts,
                         const AutotpAdapterRuns* runs, const uint16_t* x, int64_t cols,
                         uint16_t* out, int64_t rows, int64_t threads) {
    add_adapters(adapters, num_parts, *runs, x, cols, out, rows, threads);
}

// out = weight * norm(x) for each row; where `added` is given, x += added comes first. `cols` is
// a multiple of 16.
void autotp_rms_norm(uint16_t* x, const uint16_t* added, const uint16_t* weight, uint16_t* out,
                     int64_t rows, int64_t cols, float epsilon, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * cols >= kWorthSharing)
    for (int64_t row = 0; row < rows; ++row) {
        uint16_t* to = x + row * cols;
        if (added) {
            const uint16_t* more = added + row * cols;
            for (int64_t i = 0; i < cols; i += kLanes) {
                const Floats sum = add(load_bfloat16(to + i), load_bfloat16(more + i));
                store_bfloat16(to + i, sum, kLanes);
            }
        }
        normalize(to, weight, out + row * cols, cols, epsilon);
    }
}

// Norms, where asked for, and rotates queries and keys; stores keys and values into their slots.
// `head_dim` is a multiple of 32.
void autotp_rotate_and_store(const AutotpRotation* call, int64_t threads) {
    const int64_t size = call->head_dim, heads = call->heads, kv_heads = call->kv_heads;
    const int64_t row_size = (heads + 2 * kv_heads) * size;
#pragma omp parallel for num_threads(threads) \
    if (threads > 1 && call->tokens * row_size >= kWorthSharing)
    for (int64_t token = 0; token < call->tokens; ++token) {
        uint16_t* row = call->qkv + token * row_size;
        const uint16_t* cos = call->cos + token * size;
        const uint16_t* sin = call->sin + token * size;
        const int64_t slot = call->slots[token];
        for (int64_t head = 0; head < heads + kv_heads; ++head) {
            uint16_t* from = row + head * size;
            const bool is_query = head < heads;
            const uint16_t* norm = is_query ? call->query_norm : call->key_norm;
            if (norm) normalize(from, norm, from, size, call->epsilon);
            rotate(from, cos, sin, size);
            if (!is_query) {
                HeadWriter{call->pools, slot, head - heads, kv_heads}.store_key(from, size);
            }
        }
        const uint16_t* value = row + (heads + kv_heads) * size;
        for (int64_t head = 0; head < kv_heads; ++head) {
            HeadWriter{call->pools, slot, head, kv_heads}.store_value(value + head * size, size);
        }
    }
}

// out = silu(gate) * up, of rows [gate, up] of 2 * `cols` numbers; `cols` is a multiple of 16.
void autotp_silu_multiply(const uint16_t* gate_up, uint16_t* out, int64_t rows, int64_t cols,
                          int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * cols >= kWorthSharing)
    for (int64_t row = 0; row < rows; ++row) {
        const uint16_t* gate = gate_up + row * 2 * cols;
        for (int64_t i = 0; i < cols; i += kLanes) {
            const Floats x = load_bfloat16(gate + i);
            const Floats magnitude = larger(x, multiply(x, same_float(-1)));
            const Floats small = power_of_two(multiply(magnitude, same_float(-kLog2e)));
            // x * sigmoid(x), by way of exp(-|x|) so that nothing overflows.
            const Floats tail =
                multiply(magnitude, divide(small, add(same_float(1), small)));
            const Floats silu = round_to_bfloat16(subtract(larger(same_float(0), x), tail));
            store_bfloat16(out + row * cols + i,
                           multiply(silu, load_bfloat16(gate + cols + i)), kLanes);
        }
    }
}

// The first half of a layer: norm, queries, keys and values, attention, and this rank's part of the
// output in `step.out`. With `adds`, `step.out` is added to `step.hidden` before. Returns 0, or 1
// when there is no memory.
int autotp_attention_half(const AutotpLayer* layer, const AutotpStep* step, int64_t adds) {
    const int64_t tokens = step->tokens, threads = step->threads;
    autotp_rms_norm(step->hidden, adds ? step->out : nullptr, layer->input_norm, step->normed,
                    tokens, layer->qkv.cols, layer->input_epsilon, threads);
    if (multiply(layer->qkv, step->normed, step->joined, *step)) return 1;
    AutotpRotation rotation = layer->rotation;
    rotation.qkv = step->joined;
    rotation.cos = step->cos;
    rotation.sin = step->sin;
    rotation.slots = step->slots;
    rotation.tokens = tokens;
    autotp_rotate_and_store(&rotation, threads);
    AutotpAttention& attention = *step->attention;
    attention.query = step->joined;
    attention.query_token_stride = layer->qkv.rows;
    attention.query_head_stride = rotation.head_dim;
    attention.pools = rotation.pools;
    attention.out = step->narrowed;
    attention.heads = rotation.heads;
    attention.kv_heads = rotation.kv_heads;
    attention.head_dim = attention.value_dim = rotation.head_dim;
    attention.window = layer->window;
    attention.scaling = layer->scaling;
    attention.softcap = 0;
    attention.sinks = nullptr;
    if (step->attend(&attention, threads)) return 1;
    return multiply(layer->output, step->narrowed, step->out, *step);
}

// The second half: adds `step.out` to `step.hidden`, norm, gated MLP, and this rank's part of it
// in `step.out`. Returns 0, or 1 when there is no memory.
int autotp_mlp_half(const AutotpLayer* layer, const AutotpStep* step) {
    const int64_t tokens = step->tokens, threads = step->threads;
    autotp_rms_norm(step->hidden, step->out, layer->mlp_norm, step->normed, tokens,
                    layer->gate_up.cols, layer->mlp_epsilon, threads);
    if (multiply(layer->gate_up, step->normed, step->joined, *step)) return 1;
    autotp_silu_multiply(step->joined, step->narrowed, tokens, layer->down.cols, threads);
    return multiply(layer->down, step->narrowed, step->out, *step);
}

}  // extern "C"

// Short convolutions and recurrences whose states lie in a pool: kernels/cpu/recurrence.py.
//
// Runs on every rank, in the thread that calls and in the OpenMP threads it shares with torch. A
// sequence's tokens are taken one after another, and each number of a state by the same operations
// in the same order, whoever computes it: so a token's result depends neither on its neighbours in
// the batch, nor on the number of threads, nor on how the prompt was cut into chunks.
#include <omp.h>

#include <cstdint>
#include <cstring>

// The sequences of a step, as kernels/cpu/recurrence.py describes them.
struct AutotpSpans {
    const int64_t* rows;    // [sequences], of the pools
    const int64_t* starts;  // [sequences], first token
    const int64_t* lens;    // [sequences]
    const bool* is_new;     // [sequences], begins with zeros
    int64_t sequences, threads;
};

namespace {

constexpr int kLanes = 16;
constexpr int kBlock = 64;  // columns of a state that one thread carries through all tokens
constexpr int kMaxRows = 256;
constexpr int kMaxTaps = 8;

// Compiled to whatever vectors the machine has.
typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2)));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline Floats load(const uint16_t* from) {  // bfloat16
    const Halves halves = *reinterpret_cast<const Halves*>(from);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}
inline void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }

inline float to_float(float value) { return value; }
inline float to_float(uint16_t value) {  // bfloat16
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <typename Number>
void convolve(const AutotpSpans& spans, const Number* inputs, const float* taps, const float* bias,
              Number* pool, float* out, int64_t channels, int64_t num_taps) {
    const int64_t blocks = (channels + kBlock - 1) / kBlock, past_len = num_taps - 1;
#pragma omp parallel for collapse(2) num_threads(spans.threads) if (spans.threads > 1)
    for (int64_t sequence = 0; sequence < spans.sequences; ++sequence) {
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * kBlock;
            const int64_t width = channels - first < kBlock ? channels - first : kBlock;
            Number* kept = pool + spans.rows[sequence] * past_len * channels + first;
            Number past[kMaxTaps][kBlock] = {};  // inputs before those of this step
            if (!spans.is_new[sequence])
                for (int64_t tap = 0; tap < past_len; ++tap)
                    std::memcpy(past[tap], kept + tap * channels, width * sizeof(Number));
            const Number* own = inputs + spans.starts[sequence] * channels + first;
            const auto find = [&](int64_t number) {
                return number < past_len ? past[number] : own + (number - past_len) * channels;
            };
            const int64_t len = spans.lens[sequence];
            float* to = out + spans.starts[sequence] * channels + first;
            for (int64_t number = 0; number < len; ++number, to += channels) {
                if (width == kBlock) {
                    Floats sums[kBlock / kLanes] = {};
                    for (int64_t tap = 0; tap < num_taps; ++tap) {
                        const Number* from = find(number + tap);
                        const float* factors = taps + tap * channels + first;
                        for (int part = 0; part < kBlock / kLanes; ++part)
                            sums[part] +=
                                load(from + part * kLanes) * load(factors + part * kLanes);
                    }
                    for (int part = 0; part < kBlock / kLanes; ++part) {
                        if (bias != nullptr) sums[part] += load(bias + first + part * kLanes);
                        store(to + part * kLanes, sums[part]);
                    }
                    continue;
                }
                for (int64_t i = 0; i < width; ++i) {
                    float sum = 0;
                    for (int64_t tap = 0; tap < num_taps; ++tap)
                        sum += to_float(find(number + tap)[i]) * taps[tap * channels + first + i];
                    to[i] = bias == nullptr ? sum : sum + bias[first + i];
                }
            }
            for (int64_t tap = 0; tap < past_len; ++tap)
                std::memcpy(kept + tap * channels, find(len + tap), width * sizeof(Number));
        }
    }
}

// One head of one sequence, for `kWidth` columns of its values. kDecayByRow: each row of the state
// has a decay of its own.
template <int kWidth, bool kDecayByRow>
void run_gated_delta(const float* query, const float* key, const float* value, const float* decay,
                     const float* beta, float* kept, float* out, bool is_new, int64_t len,
                     int64_t heads, int64_t key_heads, int64_t key_dim, int64_t value_dim) {
    constexpr int kParts = kWidth / kLanes;
    Floats state[kMaxRows][kParts];
    for (int64_t row = 0; row < key_dim; ++row)
        for (int part = 0; part < kParts; ++part)
            state[row][part] =
                is_new ? Floats{} : load(kept + row * value_dim + part * kLanes);
    for (int64_t number = 0; number < len; ++number) {
        Floats known[kParts] = {}, change[kParts], sums[kParts] = {};
        // The state is written once a token: what decays here decays there below.
        for (int64_t row = 0; row < key_dim; ++row) {
            const float factor = key[row] * decay[kDecayByRow ? row : 0];
            for (int part = 0; part < kParts; ++part) known[part] += state[row][part] * factor;
        }
        for (int part = 0; part < kParts; ++part)
            change[part] = (load(value + part * kLanes) - known[part]) * *beta;
        for (int64_t row = 0; row < key_dim; ++row)
            for (int part = 0; part < kParts; ++part) {
                state[row][part] =
                    state[row][part] * decay[kDecayByRow ? row : 0] + change[part] * key[row];
                sums[part] += state[row][part] * query[row];
            }
        for (int part = 0; part < kParts; ++part) store(out + part * kLanes, sums[part]);
        query += key_heads * key_dim;
        key += key_heads * key_dim;
        value += heads * value_dim;
        out += heads * value_dim;
        decay += kDecayByRow ? heads * key_dim : heads;
        beta += heads;
    }
    for (int64_t row = 0; row < key_dim; ++row)
        for (int part = 0; part < kParts; ++part)
            store(kept + row * value_dim + part * kLanes, state[row][part]);
}

}  // namespace

extern "C" {

// `is_bfloat16` of the inputs and the pool; at most kMaxTaps taps.
void autotp_convolve(const AutotpSpans* spans, const void* inputs, const float* taps,
                     const float* bias, void* pool, float* out, int64_t channels,
                     int64_t num_taps, int64_t is_bfloat16) {
    if (is_bfloat16)
        convolve(*spans, static_cast<const uint16_t*>(inputs), taps, bias,
                 static_cast<uint16_t*>(pool), out, channels, num_taps);
    else
        convolve(*spans, static_cast<const float*>(inputs), taps, bias, static_cast<float*>(pool),
                 out, channels, num_taps);
}

// key_dim is at most kMaxRows, value_dim a multiple of kLanes; `decay` is one of each head, or
// where `decays_by_row`, of each dimension of its keys.
void autotp_gated_delta(const AutotpSpans* spans, const float* query, const float* key,
                        const float* value, const float* decay, const float* beta, float* pool,
                        float* out, int64_t heads, int64_t key_heads, int64_t key_dim,
                        int64_t value_dim, int64_t decays_by_row) {
    const auto run_wide =
        decays_by_row ? run_gated_delta<kBlock, true> : run_gated_delta<kBlock, false>;
    const auto run_narrow =
        decays_by_row ? run_gated_delta<kLanes, true> : run_gated_delta<kLanes, false>;
    const int64_t blocks = (value_dim + kBlock - 1) / kBlock;
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(spans->threads) \
    if (spans->threads > 1)
    for (int64_t sequence = 0; sequence < spans->sequences; ++sequence) {
        for (int64_t head = 0; head < heads; ++head) {
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t token = spans->starts[sequence], len = spans->lens[sequence];
                const bool is_new = spans->is_new[sequence];
                const int64_t key_head = head / (heads / key_heads);
                const int64_t key_at = (token * key_heads + key_head) * key_dim;
                const int64_t size = key_dim * value_dim;
                float* kept = pool + (spans->rows[sequence] * heads + head) * size;
                const int64_t at = token * heads + head, end = (block + 1) * kBlock;
                for (int64_t column = block * kBlock; column < end && column < value_dim;) {
                    const bool is_wide = end <= value_dim;
                    (is_wide ? run_wide : run_narrow)(
                        query + key_at, key + key_at, value + at * value_dim + column,
                        decay + at * (decays_by_row ? key_dim : 1), beta + at, kept + column,
                        out + at * value_dim + column, is_new, len,
                        heads, key_heads, key_dim, value_dim);
                    column += is_wide ? kBlock : kLanes;
                }
            }
        }
    }
}

// state_size is a multiple of kLanes.
void autotp_selective_scan(const AutotpSpans* spans, const float* inputs, const float* decay,
                           const float* entry, const float* exit, const int64_t* of_head,
                           float* pool, float* out, int64_t heads, int64_t groups,
                           int64_t head_dim, int64_t state_size) {
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(spans->threads) \
    if (spans->threads > 1)
    for (int64_t sequence = 0; sequence < spans->sequences; ++sequence) {
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t size = head_dim * state_size;
            float* state = pool + (spans->rows[sequence] * heads + head) * size;
            if (spans->is_new[sequence]) std::memset(state, 0, size * sizeof(float));
            for (int64_t number = 0; number < spans->lens[sequence]; ++number) {
                const int64_t token = spans->starts[sequence] + number;
                const int64_t at = token * heads + head;
                const float* in = entry + (token * groups + of_head[head]) * state_size;
                const float* from = exit + (token * groups + of_head[head]) * state_size;
                for (int64_t row = 0; row < head_dim; ++row) {
                    const float input = inputs[at * head_dim + row];
                    float* numbers = state + row * state_size;
                    Floats sums = {};
                    for (int64_t i = 0; i < state_size; i += kLanes) {
                        const Floats next = load(numbers + i) * decay[at] + load(in + i) * input;
                        store(numbers + i, next);
                        sums += next * load(from + i);
                    }
                    float sum = 0;
                    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
                    out[at * head_dim + row] = sum;
                }
            }
        }
    }
}

}  // extern "C"

// What tiles_amx.h computes, in plain C++: for tests on processors without AMX.
#pragma once

#include <cstdint>
#include <cstring>

#include "activations.h"

constexpr bool kHasTiles = true;

inline bool may_use_tiles() { return true; }
inline void start_tiles() {}
inline void stop_tiles() {}

inline void multiply_tile(const ByteBlock& x, const uint8_t* weights, int32_t* product) {
    for (int token = 0; token < 16; ++token) {
        for (int row = 0; row < 16; ++row) {
            int32_t sum = 0;
            for (int col = 0; col < kBlock; ++col) {
                const uint8_t weight = weights[col / 4 * 64 + row * 4 + col % 4];
                sum += x.codes[token][col] * static_cast<int8_t>(weight);
            }
            product[token * 16 + row] = sum;
        }
    }
}

inline void multiply_tile(const PairBlock& x, const uint8_t* weights, float* product) {
    for (int token = 0; token < 16; ++token) {
        for (int row = 0; row < 16; ++row) {
            float sum = 0;
            for (int col = 0; col < kBlock; ++col) {
                uint16_t weight;
                std::memcpy(&weight, weights + col / 2 * 64 + row * 4 + col % 2 * 2, sizeof weight);
                sum += as_float(static_cast<uint32_t>(x.values[token][col]) << 16) *
                       as_float(static_cast<uint32_t>(weight) << 16);
            }
            product[token * 16 + row] = sum;
        }
    }
}

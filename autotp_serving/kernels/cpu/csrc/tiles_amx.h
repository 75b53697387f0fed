// Products of 16 tokens with a decoded tile by AMX (Sapphire Rapids and later).
//
// tiles_none.h and tiles_emulated.h have the same names.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "activations.h"

constexpr bool kHasTiles = true;

// Linux saves these registers only for processes that ask.
inline bool may_use_tiles() {
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    return allowed;
}

// Tiles 0 (product), 1 and 3 (tokens), 2 and 4 (weights): 16 rows of 64 bytes. For each thread.
inline void start_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16};
    } config;
    // gcc 12 believes that 8 of the 64 bytes are read, and would drop the others.
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}

inline void stop_tiles() { _tile_release(); }

// gcc 12 does not know that loading a tile reads memory either.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

inline void multiply_tile(const ByteBlock& x, const uint8_t* weights, int32_t* product) {
    finish_stores();
    _tile_zero(0);
    _tile_loadd(1, x.codes, kBlock);
    _tile_loadd(2, weights, 64);
    _tile_dpbssd(0, 1, 2);
    _tile_stored(0, product, 64);
}

inline void multiply_tile(const PairBlock& x, const uint8_t* weights, float* product) {
    finish_stores();
    _tile_zero(0);
    _tile_loadd(1, x.values[0], 2 * kBlock);
    _tile_loadd(2, weights, 64);
    _tile_dpbf16ps(0, 1, 2);
    _tile_loadd(3, x.values[0] + kBlock / 2, 2 * kBlock);
    _tile_loadd(4, weights + 1024, 64);
    _tile_dpbf16ps(0, 3, 4);
    _tile_stored(0, product, 64);
}

// For processors without AMX; see tiles_amx.h.
#pragma once

#include <cstdint>

#include "activations.h"

constexpr bool kHasTiles = false;

inline bool may_use_tiles() { return false; }
inline void start_tiles() {}
inline void stop_tiles() {}
inline void multiply_tile(const ByteBlock&, const uint8_t*, int32_t*) {}
inline void multiply_tile(const PairBlock&, const uint8_t*, float*) {}

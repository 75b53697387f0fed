// How keys and values lie in the cache that the CPU's attention reads: as its products take them.
//
// Slots stand in groups of 16, a page being one or more groups. A group's keys of one head are
// words of two numbers, [head_dim / 2][16 slots]; its values are words of two slots' numbers,
// [8 pairs of slots][value_dim]. Groups are [kv_heads] of these.
#pragma once

#include <cstdint>
#include <cstring>

constexpr int64_t kGroupSlots = 16;

// Where the keys, or values, of a group's head begin; `size` is that of the head.
inline int64_t find_head(int64_t group, int64_t head, int64_t kv_heads, int64_t size) {
    return (group * kv_heads + head) * size * kGroupSlots;
}

// Stores a token's key of one head, `head_dim` numbers.
inline void store_key(const uint16_t* key, uint16_t* keys, int64_t slot, int64_t head,
                      int64_t kv_heads, int64_t head_dim) {
    uint16_t* to = keys + find_head(slot / kGroupSlots, head, kv_heads, head_dim);
    to += slot % kGroupSlots * 2;
    for (int64_t word = 0; word < head_dim / 2; ++word) {
        std::memcpy(to + word * kGroupSlots * 2, key + word * 2, 4);
    }
}

// Stores a token's value of one head, `value_dim` numbers.
inline void store_value(const uint16_t* value, uint16_t* values, int64_t slot, int64_t head,
                        int64_t kv_heads, int64_t value_dim) {
    uint16_t* to = values + find_head(slot / kGroupSlots, head, kv_heads, value_dim);
    to += slot % kGroupSlots / 2 * value_dim * 2 + slot % 2;
    for (int64_t col = 0; col < value_dim; ++col) to[col * 2] = value[col];
}

// One call of autotp_paged_attention, as kernels/cpu/attention.py describes it; strides are in
// numbers.
#pragma once

#include <cstdint>

#include "kv_layout.h"

struct AutotpAttention {
    const uint16_t* query;  // [tokens, heads, head_dim]
    int64_t query_token_stride, query_head_stride;
    AutotpPools pools;
    uint16_t* out;          // [tokens, heads, value_dim]
    const int32_t* tables;  // [rows, table_stride], blocks
    int64_t table_stride;
    const int32_t* rows;          // [sequences], each one's table
    const int32_t* context_lens;  // [sequences]
    const int32_t* starts;        // [sequences + 1], first query token of each
    int64_t sequences, heads, kv_heads, head_dim, value_dim;
    int64_t block_size;  // slots of a block, a multiple of 16
    int64_t window;      // latest positions that are visible, or 0 for all
    float scaling;
    float softcap;  // 0 for none
    const float* sinks;  // [heads], a logit of each that has no value; null for none
};

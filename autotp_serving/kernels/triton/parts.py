"""What decode and prefill attention share inside their kernels."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def find_slots(table, positions, mask, BLOCK_SIZE: tl.constexpr):
    """Cache slots (int64) of positions of one sequence; `table` points to its first block."""
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=mask, other=0)
    return blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def scale_logits(products, scaling, softcap, HAS_SOFTCAP: tl.constexpr):
    """Products of queries and keys as logits to the base 2, softcap * tanh(x / softcap) if asked."""
    if HAS_SOFTCAP:
        # tanh by exp, which every backend has: at its ends exp gives 0 or infinity, both right.
        grown = tl.exp(products * (2.0 * scaling / softcap))
        return (softcap * LOG2_E) * (1.0 - 2.0 / (grown + 1.0))
    return products * (scaling * LOG2_E)


@triton.jit
def add_sink(largest, total, sink):
    """Let an extra logit without a value into a softmax.

    Returns:
        The new largest logit and total, and what sums of values so far are multiplied by.
    """
    sink = sink.to(tl.float32) * LOG2_E
    joined = tl.maximum(largest, sink)
    kept = tl.exp2(largest - joined)
    return joined, total * kept + tl.exp2(sink - joined), kept

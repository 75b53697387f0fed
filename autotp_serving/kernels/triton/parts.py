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
def widen(numbers):
    """Keys or values in float32."""
    if numbers.dtype == tl.int8:
        # The bits of 1.5 * 2**23 plus a code are that sum's: an addition of whole numbers and one
        # of floats, at several times the speed of a conversion on a GPU.
        bits = numbers.to(tl.int32) + 0x4B400000
        return bits.to(tl.float32, bitcast=True) - 12582912.0
    return numbers.to(tl.float32)


@triton.jit
def cap_products(products, scaling, softcap, HAS_SOFTCAP: tl.constexpr):
    """Products of queries and keys, softcap * tanh(x / softcap) of the scaled ones if asked.

    Returns:
        What a softmax is taken of, and a factor (positive) that makes it logits to the base 2: left
        out here, it becomes one operation with the subtraction of the largest.
    """
    if HAS_SOFTCAP:
        # tanh by exp, which every backend has: at its ends exp gives 0 or infinity, both right.
        grown = tl.exp(products * (2.0 * scaling / softcap))
        products = 1.0 - 2.0 / (grown + 1.0)
        factor = softcap * LOG2_E
    else:
        factor = scaling * LOG2_E
    return products, factor


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


if hasattr(tl.extra.cuda, "gdc_wait"):

    @triton.jit
    def launch_dependents():
        """Let the next kernel begin before this one has ended."""
        tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def wait_for_inputs():
        """Wait until the kernels before this one have ended."""
        tl.extra.cuda.gdc_wait()

else:  # Triton for Intel GPUs, where kernels do not overlap

    @triton.jit
    def launch_dependents():
        """Nothing."""

    @triton.jit
    def wait_for_inputs():
        """Nothing."""

"""Writing new keys and values into the paged cache, rounded to int8 where the cache is of int8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotp_serving.kernels.triton.cards import choose_store_options
from autotp_serving.kernels.triton.inputs import Pools

LARGEST_CODE = tl.constexpr(127.0)
SMALLEST_DIVISOR = tl.constexpr(1e-30)
"""Below it a row is zeros: the inverse of less would overflow."""


@triton.jit
def _round_to_even(x):
    """The nearest whole number, halves to even; there is no such word that all backends know."""
    below = tl.floor(x)
    rest = x - below
    is_odd = below - 2.0 * tl.floor(below * 0.5) == 1.0
    return below + tl.where((rest > 0.5) | ((rest == 0.5) & is_odd), 1.0, 0.0)


@triton.jit
def _store_rows(
    source,
    pool,
    scales,
    slot,
    heads,
    dims,
    mask,
    num_kv_heads,
    source_stride,
    HEAD_DIM: tl.constexpr,
):
    """Store [HEADS, DIMS] of a token; `source` points to its first number."""
    rows = tl.load(source + heads[:, None] * source_stride + dims[None, :], mask=mask, other=0.0)
    where = pool + (slot * num_kv_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
    if pool.dtype.element_ty == tl.int8:
        rows = rows.to(tl.float32)
        largest = tl.max(tl.abs(rows), axis=1)
        # A maximum passes over NaN, which must make its whole row NaN.
        is_spoiled = tl.max((rows != rows).to(tl.int32), axis=1) > 0
        largest = tl.where(is_spoiled, float("nan"), largest)
        inverse = tl.div_rn(
            tl.full(largest.shape, LARGEST_CODE, tl.float32), tl.maximum(largest, SMALLEST_DIVISOR)
        )
        scaled = rows * inverse[:, None]
        codes = tl.where(scaled == scaled, _round_to_even(scaled), 0.0)
        codes = tl.where(is_spoiled[:, None], 0.0, codes)
        tl.store(where, codes.to(tl.int8), mask=mask)
        divisor = tl.full(largest.shape, LARGEST_CODE, tl.float32)
        tl.store(
            scales + slot * num_kv_heads + heads,
            tl.div_rn(largest, divisor),
            mask=heads < num_kv_heads,
        )
    else:
        tl.store(where, rows.to(pool.dtype.element_ty), mask=mask)


@triton.jit
def store_kernel(
    key,
    value,
    slots,
    keys,
    values,
    key_scales,
    value_scales,
    num_kv_heads,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One program: HEADS heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, DIMS)
    mask = (heads < num_kv_heads)[:, None] & (dims < HEAD_DIM)[None, :]
    _store_rows(
        key + token * key_token_stride,
        keys,
        key_scales,
        slot,
        heads,
        dims,
        mask,
        num_kv_heads,
        key_head_stride,
        HEAD_DIM,
    )
    _store_rows(
        value + token * value_token_stride,
        values,
        value_scales,
        slot,
        heads,
        dims,
        mask,
        num_kv_heads,
        value_head_stride,
        HEAD_DIM,
    )


def store(key: Tensor, value: Tensor, slots: Tensor, pools: Pools) -> None:
    """Write rows of new tokens into their slots.

    An int8 cache holds what `kernels/kv_pools.py`'s `quantize` gives, to the bit.

    Args:
        key, value: [num_tokens, num_kv_heads, head_dim], the last dimension contiguous; they may
            be slices of a wider product.
        slots: [num_tokens] int64; -1 is not written.
    """
    num_tokens, num_kv_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    dims = triton.next_power_of_2(head_dim)
    heads = min(triton.next_power_of_2(num_kv_heads), max(1, 1024 // dims))
    is_int8 = pools.keys.dtype == torch.int8
    store_kernel[(num_tokens, triton.cdiv(num_kv_heads, heads))](
        key,
        value,
        slots,
        pools.keys,
        pools.values,
        pools.key_scales if is_int8 else slots,
        pools.value_scales if is_int8 else slots,
        num_kv_heads,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        HEAD_DIM=head_dim,
        DIMS=dims,
        HEADS=heads,
        num_warps=4,
        # A product joined with the sum after it would round once where torch rounds twice.
        enable_fp_fusion=False,
        **choose_store_options(key.device),
    )

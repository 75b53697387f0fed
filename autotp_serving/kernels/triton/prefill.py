"""Paged causal attention of several tokens a sequence, from a cached prefix; lengths may be mixed.

Keys are walked in tiles that begin at multiples of their size, and a tile beyond what a query sees
changes nothing, so a query's result does not depend on how its prompt was cut into chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotp_serving.kernels.triton.cards import PrefillTiles
from autotp_serving.kernels.triton.inputs import Inputs, Pools
from autotp_serving.kernels.triton.parts import add_sink, cap_products, find_slots


@triton.jit
def _find_sequence(query_starts, num_seqs, tile, QUERIES: tl.constexpr):
    """The sequence whose queries hold a tile, when each may waste one tile."""
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _attend_keys(
    queries,
    largest,
    total,
    sums,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    begin,
    end,
    context_len,
    query_positions,
    slot_stride,
    scale_stride,
    scaling,
    softcap,
    window,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Let queries attend to positions [begin, end); unmasked, each must see all of them."""
    is_int8: tl.constexpr = keys.dtype.element_ty == tl.int8
    weight_type: tl.constexpr = tl.bfloat16 if is_int8 else values.dtype.element_ty
    dims = tl.arange(0, DIMS)
    offsets = tl.arange(0, KEYS)
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        positions = start + offsets
        is_owned = positions < context_len
        slots = find_slots(table, positions, is_owned, BLOCK_SIZE)
        where = slots[:, None] * slot_stride + dims[None, :]
        if IS_MASKED:
            mask = is_owned[:, None]
            if DIMS != HEAD_DIM:
                mask = mask & (dims < HEAD_DIM)[None, :]
            key = tl.load(keys + where, mask=mask, other=0.0)
            value = tl.load(values + where, mask=mask, other=0.0)
        elif DIMS != HEAD_DIM:
            mask = (dims < HEAD_DIM)[None, :]
            key = tl.load(keys + where, mask=mask, other=0.0)
            value = tl.load(values + where, mask=mask, other=0.0)
        else:
            key = tl.load(keys + where)
            value = tl.load(values + where)
        products = tl.dot(queries, tl.trans(key.to(queries.dtype)))
        if is_int8:
            scales = tl.load(key_scales + slots * scale_stride, mask=is_owned, other=0.0)
            products *= scales[None, :]
        products, factor = cap_products(products, scaling, softcap, HAS_SOFTCAP)
        if IS_MASKED:
            is_seen = positions[None, :] <= query_positions[:, None]
            if HAS_WINDOW:
                is_seen = is_seen & (positions[None, :] > query_positions[:, None] - window)
            products = tl.where(is_seen, products, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(products, axis=1) * factor)
        base = new_largest
        if HAS_WINDOW:
            # Nothing may be seen yet: then weights are exp2(-inf - 0).
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(products * factor - base[:, None])
        kept = tl.exp2(largest - base)
        total = total * kept + tl.sum(weights, axis=1)
        if is_int8:
            scales = tl.load(value_scales + slots * scale_stride, mask=is_owned, other=0.0)
            weights *= scales[None, :]
        sums = sums * kept[:, None]
        sums = tl.dot(weights.to(weight_type), value.to(weight_type), sums)
        largest = new_largest
    return largest, total, sums


@triton.jit(do_not_specialize=["num_seqs"])
def prefill_kernel(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    sinks,
    rows,
    query_starts,
    context_lens,
    block_tables,
    out,
    num_seqs,
    query_stride,
    query_head_stride,
    out_stride,
    out_head_stride,
    table_stride,
    num_kv_heads,
    scaling,
    softcap,
    window,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    SKIPS_SINGLE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One program: QUERIES tokens of one sequence, one head."""
    head = tl.program_id(0)
    # Late tiles see most keys: they go first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq = _find_sequence(query_starts, num_seqs, tile, QUERIES)
    start = tl.load(query_starts + seq)
    query_len = tl.load(query_starts + seq + 1) - start
    first = (tile - start // QUERIES - seq) * QUERIES
    if first >= query_len:
        return
    if SKIPS_SINGLE and query_len == 1:
        return
    context_len = tl.load(context_lens + seq)
    table = block_tables + tl.load(rows + seq).to(tl.int64) * table_stride
    slot_stride = num_kv_heads * HEAD_DIM
    kv_head = head // GROUP
    keys += kv_head * HEAD_DIM
    values += kv_head * HEAD_DIM
    key_scales += kv_head
    value_scales += kv_head
    dims = tl.arange(0, DIMS)
    indices = first + tl.arange(0, QUERIES)
    tokens = (start + indices).to(tl.int64)
    mask = (indices < query_len)[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(
        query + head * query_head_stride + tokens[:, None] * query_stride + dims[None, :],
        mask=mask,
        other=0.0,
    )
    first_position = context_len - query_len + first
    query_positions = context_len - query_len + indices
    end = tl.minimum(first_position + QUERIES, context_len)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, DIMS], tl.float32)
    masked_from = 0
    if HAS_WINDOW:
        masked_from = tl.maximum(first_position - window + 1, 0) // KEYS * KEYS
    else:
        # Tiles that every query here sees whole.
        masked_from = tl.maximum(first_position + 1, 0) // KEYS * KEYS
        largest, total, sums = _attend_keys(
            queries,
            largest,
            total,
            sums,
            keys,
            values,
            key_scales,
            value_scales,
            table,
            0,
            masked_from,
            context_len,
            query_positions,
            slot_stride,
            num_kv_heads,
            scaling,
            softcap,
            window,
            HEAD_DIM,
            DIMS,
            BLOCK_SIZE,
            KEYS,
            STAGES,
            False,
            HAS_WINDOW,
            HAS_SOFTCAP,
        )
    largest, total, sums = _attend_keys(
        queries,
        largest,
        total,
        sums,
        keys,
        values,
        key_scales,
        value_scales,
        table,
        masked_from,
        end,
        context_len,
        query_positions,
        slot_stride,
        num_kv_heads,
        scaling,
        softcap,
        window,
        HEAD_DIM,
        DIMS,
        BLOCK_SIZE,
        KEYS,
        STAGES,
        True,
        HAS_WINDOW,
        HAS_SOFTCAP,
    )
    if HAS_SINKS:
        _, total, kept = add_sink(largest, total, tl.load(sinks + head))
        sums *= kept[:, None]
    # Padding sees nothing.
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out + head * out_head_stride + tokens[:, None] * out_stride + dims[None, :],
        result.to(out.dtype.element_ty),
        mask=mask,
    )


def prefill(
    query: Tensor,
    pools: Pools,
    inputs: Inputs,
    out: Tensor,
    tiles: PrefillTiles,
    block_size: int,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    skips_single: bool,
) -> None:
    """Attend for the sequences of a step; see `attention.py`.

    Args:
        skips_single: leave out those that run one token.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = pools.keys.shape[1]
    is_int8 = pools.keys.dtype == torch.int8
    num_tiles = inputs.num_tokens // tiles.queries + inputs.num_seqs
    prefill_kernel[(num_heads, num_tiles)](
        query, pools.keys, pools.values,
        pools.key_scales if is_int8 else query,
        pools.value_scales if is_int8 else query,
        query if sinks is None else sinks,
        inputs.rows, inputs.query_starts, inputs.context_lens, inputs.block_tables, out,
        inputs.num_seqs, query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        inputs.block_tables.stride(0), num_kv_heads, scaling, softcap or 1.0, sliding_window or 0,
        GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size,
        QUERIES=tiles.queries, KEYS=tiles.keys, STAGES=tiles.stages, SKIPS_SINGLE=skips_single,
        HAS_WINDOW=sliding_window is not None, HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None, num_warps=tiles.warps, num_stages=tiles.stages,
        **dict(tiles.options),
    )  # fmt: skip

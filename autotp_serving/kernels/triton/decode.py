"""Paged attention of single tokens: each context is split, the splits merged in a fixed order.

Where a split begins and ends depends on its own sequence's context alone, so that a row's result
is the same to the bit whatever else is in the batch. Among many rows a program takes several
splits, one after another, and leaves for each what a program of its own would. The grid depends on
the number of rows alone and no number is read by the host: both kernels can be captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from autotp_serving.kernels.triton.cards import DecodeTiles
from autotp_serving.kernels.triton.inputs import Inputs, Pools
from autotp_serving.kernels.triton.parts import (
    add_sink,
    cap_products,
    find_slots,
    launch_dependents,
    wait_for_inputs,
    widen,
)


@dataclass(frozen=True)
class DecodeWorkspace:
    """What the splits of a step leave for their merge; all layers share one.

    Attributes:
        sums: [max_rows, num_heads, max_splits, head_dim] float32, of weighted values.
        stats: [max_rows, num_heads, max_splits, 2] float32, largest logit and total weight.
        arrivals: [max_rows, num_heads] int32, splits done so far; zeros between two kernels.
    """

    sums: Tensor
    stats: Tensor
    arrivals: Tensor


def allocate_workspace(
    max_rows: int, num_heads: int, head_dim: int, tiles: DecodeTiles, device: torch.device
) -> DecodeWorkspace:
    """Make a workspace for steps of up to `max_rows` single tokens."""
    sizes = (max_rows, num_heads, tiles.max_splits)
    return DecodeWorkspace(
        torch.empty((*sizes, head_dim), dtype=torch.float32, device=device),
        torch.empty((*sizes, 2), dtype=torch.float32, device=device),
        torch.zeros((max_rows, num_heads), dtype=torch.int32, device=device),
    )


@triton.jit
def _find_split(
    context_len,
    window,
    HAS_WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """How a context is split, without a division by a number that is not constant (which Intel's
    compiler does in fp64 where there is any).

    Returns:
        The first position seen; where the first split begins; how long a split is, and all of them.
    """
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(context_len - window, 0)
    begin = first // TILE * TILE
    length = context_len - begin
    split_len = (length + MAX_SPLITS * TILE - 1) // (MAX_SPLITS * TILE) * TILE
    return first, begin, tl.maximum(split_len, MIN_SPLIT), length


@triton.jit
def _prefetch(pool, slots, slot_stride, NUM_BYTES: tl.constexpr):
    """Ask for rows of a pool to be in the second-level cache; NVIDIA, from Hopper on."""
    addresses = (pool + slots * slot_stride).to(tl.int64)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // dummy $0",
        "=r,l,r",
        [addresses, tl.full(addresses.shape, NUM_BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _attend_by_sum(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    first,
    begin,
    end,
    split_len,
    stats,
    results,
    slot_stride,
    scale_stride,
    scaling,
    softcap,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """One head over positions [begin, end): largest logit, total weight, weighted values [DIMS].

    Those of each split are stored, the first's at `stats` and `results`.
    """
    is_int8: tl.constexpr = keys.dtype.element_ty == tl.int8
    dims = tl.arange(0, DIMS)
    offsets = tl.arange(0, TILE)
    row = tl.load(query + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
    largest = float("-inf")
    total = 0.0
    sums = tl.zeros([DIMS], tl.float32)
    split_end = tl.minimum(begin + split_len, end)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        positions = start + offsets
        is_seen = (positions < end) & (positions >= first)
        slots = find_slots(table, positions, is_seen, BLOCK_SIZE)
        where = slots[:, None] * slot_stride + dims[None, :]
        mask = is_seen[:, None]
        if DIMS != HEAD_DIM:
            mask = mask & (dims < HEAD_DIM)[None, :]
        key = widen(tl.load(keys + where, mask=mask, other=0))
        value = widen(tl.load(values + where, mask=mask, other=0))
        products = tl.sum(key * row[None, :], axis=1)
        if is_int8:
            products *= tl.load(key_scales + slots * scale_stride, mask=is_seen, other=0.0)
        products, factor = cap_products(products, scaling, softcap, HAS_SOFTCAP)
        products = tl.where(is_seen, products, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(products, axis=0) * factor)
        weights = tl.exp2(products * factor - new_largest)
        kept = tl.exp2(largest - new_largest)
        total = total * kept + tl.sum(weights, axis=0)
        if is_int8:
            weights *= tl.load(value_scales + slots * scale_stride, mask=is_seen, other=0.0)
        sums = sums * kept + tl.sum(weights[:, None] * value, axis=0)
        largest = new_largest
        if SPLITS > 1:  # noqa: SIM102 (the one is known to the compiler)
            if start + TILE >= split_end:
                tl.store(stats, largest)
                tl.store(stats + 1, total)
                tl.store(results + dims, sums, mask=dims < HEAD_DIM)
                stats += 2
                results += HEAD_DIM
                split_end = tl.minimum(split_end + split_len, end)
                # What was summed up so far counts nothing from here on.
                largest = tl.full([], float("-inf"), tl.float32)
    if SPLITS == 1:
        tl.store(stats, largest)
        tl.store(stats + 1, total)
        tl.store(results + dims, sums, mask=dims < HEAD_DIM)


@triton.jit
def _attend_by_dot(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    first,
    begin,
    end,
    split_len,
    stats,
    results,
    query_head_stride,
    slot_stride,
    scale_stride,
    scaling,
    softcap,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """The heads of a group over [begin, end): largest [HEADS], totals, values [HEADS, DIMS].

    Those of each split are stored, the first head's of the first at `stats` and `results`.
    """
    is_int8: tl.constexpr = keys.dtype.element_ty == tl.int8
    # Codes times a scale would leave fp16's range; bf16 holds codes exactly and any scale.
    weight_type: tl.constexpr = tl.bfloat16 if is_int8 else values.dtype.element_ty
    heads = tl.arange(0, HEADS)
    dims = tl.arange(0, DIMS)
    offsets = tl.arange(0, TILE)
    rows = tl.load(
        query + heads[:, None] * query_head_stride + dims[None, :],
        mask=(heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )
    largest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([HEADS, DIMS], tl.float32)
    split_end = tl.minimum(begin + split_len, end)
    places = heads * MAX_SPLITS
    is_head = heads < GROUP
    is_result = is_head[:, None] & (dims < HEAD_DIM)[None, :]
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        positions = start + offsets
        is_seen = (positions < end) & (positions >= first)
        slots = find_slots(table, positions, is_seen, BLOCK_SIZE)
        where = slots[:, None] * slot_stride + dims[None, :]
        mask = is_seen[:, None]
        if DIMS != HEAD_DIM:
            mask = mask & (dims < HEAD_DIM)[None, :]
        key = tl.load(keys + where, mask=mask, other=0.0)
        value = tl.load(values + where, mask=mask, other=0.0)
        products = tl.dot(rows, tl.trans(key.to(rows.dtype)))
        if is_int8:
            scales = tl.load(key_scales + slots * scale_stride, mask=is_seen, other=0.0)
            products *= scales[None, :]
        products, factor = cap_products(products, scaling, softcap, HAS_SOFTCAP)
        products = tl.where(is_seen[None, :], products, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(products, axis=1) * factor)
        weights = tl.exp2(products * factor - new_largest[:, None])
        kept = tl.exp2(largest - new_largest)
        total = total * kept + tl.sum(weights, axis=1)
        if is_int8:
            scales = tl.load(value_scales + slots * scale_stride, mask=is_seen, other=0.0)
            weights *= scales[None, :]
        sums = sums * kept[:, None] + tl.dot(weights.to(weight_type), value.to(weight_type))
        largest = new_largest
        if SPLITS > 1:  # noqa: SIM102 (the one is known to the compiler)
            if start + TILE >= split_end:
                tl.store(stats + places * 2, largest, mask=is_head)
                tl.store(stats + places * 2 + 1, total, mask=is_head)
                to = results + places[:, None] * HEAD_DIM + dims[None, :]
                tl.store(to, sums, mask=is_result)
                places += 1
                split_end = tl.minimum(split_end + split_len, end)
                # What was summed up so far counts nothing from here on.
                largest = tl.full([HEADS], float("-inf"), tl.float32)
    if SPLITS == 1:
        tl.store(stats + places * 2, largest, mask=is_head)
        tl.store(stats + places * 2 + 1, total, mask=is_head)
        to = results + places[:, None] * HEAD_DIM + dims[None, :]
        tl.store(to, sums, mask=is_result)


@triton.jit
def _merge_head(
    sums,
    stats,
    sinks,
    out,
    base,
    head,
    split_len,
    length,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Write a head's output from its splits; zeros where there is none.

    Args:
        base: of the head's first split in `stats`, in splits.
        out: points to the head's output.
    """
    splits = tl.arange(0, MAX_SPLITS)
    dims = tl.arange(0, DIMS)
    is_split = splits * split_len < length
    places = base + splits
    largest = tl.load(stats + places * 2, mask=is_split, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(stats + places * 2 + 1, mask=is_split, other=0.0, cache_modifier=".cg")
    parts = tl.load(
        sums + places[:, None] * HEAD_DIM + dims[None, :],
        mask=is_split[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    is_any = length > 0
    overall = tl.where(is_any, tl.max(largest, axis=0), 0.0)
    shares = tl.where(is_split, tl.exp2(largest - overall), 0.0)
    total = tl.where(is_any, tl.sum(shares * totals, axis=0), 1.0)
    result = tl.sum(shares[:, None] * parts, axis=0)
    if HAS_SINKS:
        overall, total, kept = add_sink(overall, total, tl.load(sinks + head))
        result *= kept
    result = tl.where(is_any, result / total, 0.0)
    tl.store(out + dims, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
def decode_kernel(
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
    sums,
    stats,
    arrivals,
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
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    USE_DOT: tl.constexpr,
    MERGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
    IS_MIXED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One program: some splits of a row's context, for one head or for the group of a kv head.

    Args:
        SPLITS: how many a program takes, one after another, a power of two.
        IS_MIXED: rows of several tokens are left out, and a row's token is found in query_starts.
        MERGES: the last split of a head to arrive merges them all; else `merge_kernel` does.
        OVERLAPS: the program may begin before the step's keys, values and queries are there: what
            lies in the cache already is asked for meanwhile.
    """
    if OVERLAPS:
        launch_dependents()
    part = tl.program_id(0)
    split = tl.program_id(1) * SPLITS
    seq = tl.program_id(2)
    token = seq
    if IS_MIXED:
        token = tl.load(query_starts + seq)
        if tl.load(query_starts + seq + 1) != token + 1:
            return
    context_len = tl.load(context_lens + seq)
    table = block_tables + tl.load(rows + seq).to(tl.int64) * table_stride
    first, begin, split_len, length = _find_split(
        context_len, window, HAS_WINDOW, TILE, MIN_SPLIT, MAX_SPLITS
    )
    # Of a context of nothing, the first split says so.
    if split * split_len >= tl.maximum(length, 1):
        return
    begin += split * split_len
    end = tl.minimum(begin + SPLITS * split_len, context_len)
    slot_stride = num_kv_heads * HEAD_DIM
    kv_head = part if USE_DOT else part // GROUP
    head = part * GROUP if USE_DOT else part
    num_heads = num_kv_heads * GROUP
    query += token.to(tl.int64) * query_stride + head * query_head_stride
    out += token.to(tl.int64) * out_stride + head * out_head_stride
    keys += kv_head * HEAD_DIM
    values += kv_head * HEAD_DIM
    if OVERLAPS:
        row_bytes: tl.constexpr = HEAD_DIM * keys.dtype.element_ty.primitive_bitwidth // 8
        if row_bytes % 16 == 0:
            positions = begin + tl.arange(0, MIN_SPLIT)
            slots = find_slots(table, positions, positions < end, BLOCK_SIZE)
            _prefetch(keys, slots, slot_stride, row_bytes)
            _prefetch(values, slots, slot_stride, row_bytes)
        wait_for_inputs()
    # In splits: of the first head's first.
    base = (seq.to(tl.int64) * num_heads + head) * MAX_SPLITS
    if USE_DOT:
        _attend_by_dot(
            query,
            keys,
            values,
            key_scales + kv_head,
            value_scales + kv_head,
            table,
            first,
            begin,
            end,
            split_len,
            stats + (base + split) * 2,
            sums + (base + split) * HEAD_DIM,
            query_head_stride,
            slot_stride,
            num_kv_heads,
            scaling,
            softcap,
            GROUP,
            HEADS,
            HEAD_DIM,
            DIMS,
            BLOCK_SIZE,
            TILE,
            STAGES,
            SPLITS,
            MAX_SPLITS,
            HAS_SOFTCAP,
        )
    else:
        _attend_by_sum(
            query,
            keys,
            values,
            key_scales + kv_head,
            value_scales + kv_head,
            table,
            first,
            begin,
            end,
            split_len,
            stats + (base + split) * 2,
            sums + (base + split) * HEAD_DIM,
            slot_stride,
            num_kv_heads,
            scaling,
            softcap,
            HEAD_DIM,
            DIMS,
            BLOCK_SIZE,
            TILE,
            STAGES,
            SPLITS,
            HAS_SOFTCAP,
        )
    if MERGES:
        # Every thread's stores come before the arrival, which releases them to the last program.
        tl.debug_barrier()
        splits = tl.arange(0, MAX_SPLITS)
        num_programs = tl.sum((splits * SPLITS * split_len < length).to(tl.int32), axis=0)
        arrival = arrivals + seq * num_heads + head
        if tl.atomic_add(arrival, 1, sem="acq_rel") >= num_programs - 1:
            tl.store(arrival, 0)
            for index in range(GROUP if USE_DOT else 1):
                _merge_head(
                    sums,
                    stats,
                    sinks,
                    out + index * out_head_stride,
                    base + index * MAX_SPLITS,
                    head + index,
                    split_len,
                    length,
                    HEAD_DIM,
                    DIMS,
                    MAX_SPLITS,
                    HAS_SINKS,
                )


@triton.jit
def merge_kernel(
    sinks,
    query_starts,
    context_lens,
    out,
    sums,
    stats,
    out_stride,
    out_head_stride,
    window,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    IS_MIXED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One program: the splits of one row's head."""
    if OVERLAPS:
        launch_dependents()
        wait_for_inputs()
    head = tl.program_id(0)
    seq = tl.program_id(1)
    token = seq
    if IS_MIXED:
        token = tl.load(query_starts + seq)
        if tl.load(query_starts + seq + 1) != token + 1:
            return
    _, _, split_len, length = _find_split(
        tl.load(context_lens + seq), window, HAS_WINDOW, TILE, MIN_SPLIT, MAX_SPLITS
    )
    _merge_head(
        sums,
        stats,
        sinks,
        out + token.to(tl.int64) * out_stride + head * out_head_stride,
        (seq.to(tl.int64) * tl.num_programs(0) + head) * MAX_SPLITS,
        head,
        split_len,
        length,
        HEAD_DIM,
        DIMS,
        MAX_SPLITS,
        HAS_SINKS,
    )


def decode(
    query: Tensor,
    pools: Pools,
    inputs: Inputs,
    out: Tensor,
    workspace: DecodeWorkspace,
    tiles: DecodeTiles,
    block_size: int,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    is_mixed: bool = False,
) -> None:
    """Attend for the rows of a step that run a single token; see `attention.py`."""
    num_seqs = inputs.context_lens.shape[0]
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = pools.keys.shape[1]
    group = num_heads // num_kv_heads
    dims = triton.next_power_of_2(head_dim)
    is_int8 = pools.keys.dtype == torch.int8
    # Where no row of a mixed step is a single token no program would wait, and the next kernel
    # would begin too early.
    overlaps = num_seqs <= tiles.overlapping_rows and not is_mixed
    options = {**dict(tiles.options), **({"launch_pdl": True} if overlaps else {})}
    shape = {
        "HEAD_DIM": head_dim, "DIMS": dims, "TILE": tiles.tile, "MIN_SPLIT": tiles.min_split,
        "MAX_SPLITS": tiles.max_splits, "OVERLAPS": overlaps, "IS_MIXED": is_mixed,
        "HAS_WINDOW": sliding_window is not None, "HAS_SINKS": sinks is not None,
    }  # fmt: skip
    sinks = workspace.stats if sinks is None else sinks
    window = sliding_window or 0
    num_parts = num_kv_heads if tiles.use_dot else num_heads
    splits = tiles.splits_of_many if num_seqs >= tiles.many_rows else 1
    decode_kernel[(num_parts, tiles.max_splits // splits, num_seqs)](
        query, pools.keys, pools.values,
        pools.key_scales if is_int8 else workspace.stats,
        pools.value_scales if is_int8 else workspace.stats,
        sinks, inputs.rows, inputs.query_starts, inputs.context_lens, inputs.block_tables,
        out, workspace.sums, workspace.stats, workspace.arrivals,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        inputs.block_tables.stride(0), num_kv_heads, scaling, softcap or 1.0, window,
        GROUP=group, HEADS=max(16, triton.next_power_of_2(group)), BLOCK_SIZE=block_size,
        STAGES=tiles.stages, SPLITS=splits, USE_DOT=tiles.use_dot, MERGES=tiles.merges,
        HAS_SOFTCAP=softcap is not None, num_warps=tiles.warps, num_stages=tiles.stages, **shape,
        **options,
    )  # fmt: skip
    if not tiles.merges:
        merge_kernel[(num_heads, num_seqs)](
            sinks, inputs.query_starts, inputs.context_lens, out, workspace.sums, workspace.stats,
            out.stride(0), out.stride(1), window, num_warps=tiles.merge_warps, **shape,
            **options,
        )  # fmt: skip

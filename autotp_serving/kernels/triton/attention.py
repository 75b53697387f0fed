"""Attention over the paged KV cache in Triton: what the rest of a rank calls. Every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.kernels.triton import decode as decode_kernels
from autotp_serving.kernels.triton import prefill as prefill_kernels
from autotp_serving.kernels.triton.cards import (
    DecodeTiles,
    PrefillTiles,
    choose_decode,
    choose_prefill,
    find_card,
)
from autotp_serving.kernels.triton.inputs import Inputs, Pools
from autotp_serving.kernels.triton.store import store

__all__ = ["Workspace", "allocate_workspace", "can_attend", "decode", "prefill", "store"]

HEAD_DIMS = range(16, 257)
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Workspace:
    """What attention of one shape keeps between steps; layers of that shape share it."""

    block_size: int
    decode_tiles: DecodeTiles
    prefill_tiles: PrefillTiles
    splits: decode_kernels.DecodeWorkspace

    @property
    def num_bytes(self) -> int:
        """Of the device's memory."""
        parts = self.splits
        return sum(part.nbytes for part in (parts.sums, parts.stats, parts.arrivals))


def can_attend(
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    block_size: int,
) -> bool:
    """Whether the kernels take a layer of this shape."""
    return (
        dtype in DTYPES
        and num_heads % num_kv_heads == 0
        and head_dim in HEAD_DIMS
        and head_dim % 8 == 0
        and value_head_dim == head_dim
        and block_size >= 16
    )


def allocate_workspace(
    max_rows: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    is_int8: bool,
    device: torch.device,
) -> Workspace:
    """Choose tiles for the card and make room for steps of up to `max_rows` sequences.

    Args:
        num_heads, num_kv_heads: of this rank.
    """
    card = find_card(device)
    decode_tiles = choose_decode(card, num_heads // num_kv_heads, head_dim, is_int8)
    return Workspace(
        block_size,
        decode_tiles,
        choose_prefill(card, head_dim, is_int8),
        decode_kernels.allocate_workspace(max_rows, num_heads, head_dim, decode_tiles, device),
    )


def decode(
    query: Tensor,
    pools: Pools,
    inputs: Inputs,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor,
    workspace: Workspace,
) -> Tensor:
    """Attend for sequences that run one token each; can be captured in a graph.

    A row's result depends on its own query and context alone, to the bit. Drafts can be verified
    by it too: give each of their tokens as a row of its own, with its sequence's entry of `rows`
    and a context that ends with it.

    Args:
        query: [num_seqs, num_heads, head_dim], rotated; may be a slice of a wider product.
        pools: the layer's, with this step's keys and values.
        inputs: `rows`, `context_lens` and `block_tables` are read.
        scaling: what products of queries and keys are multiplied by.
        sliding_window: how many of the latest positions are visible; None for all.
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: [num_heads] an extra logit of each head, without a value.
        out: [num_seqs, num_heads, head_dim], written; zeros where context_len is 0.

    Returns:
        out.
    """
    decode_kernels.decode(
        query, pools, inputs, out, workspace.splits, workspace.decode_tiles, workspace.block_size,
        scaling, sliding_window, softcap, sinks,
    )  # fmt: skip
    return out


def prefill(
    query: Tensor,
    pools: Pools,
    inputs: Inputs,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor,
    workspace: Workspace,
) -> Tensor:
    """Attend for sequences that run any number of tokens, their last `query_len` of a context.

    Those that run one token are attended by `decode`'s kernels, so that a row's result is the same
    whether or not a prompt runs beside it. Arguments as there, but query and out are
    [num_tokens, num_heads, head_dim].

    Returns:
        out.
    """
    has_singles = inputs.num_seqs > 1 or inputs.max_query_len == 1
    prefill_kernels.prefill(
        query, pools, inputs, out, workspace.prefill_tiles, workspace.block_size,
        scaling, sliding_window, softcap, sinks, skips_single=has_singles,
    )  # fmt: skip
    if has_singles:
        decode_kernels.decode(
            query, pools, inputs, out, workspace.splits, workspace.decode_tiles,
            workspace.block_size, scaling, sliding_window, softcap, sinks, is_mixed=True,
        )  # fmt: skip
    return out

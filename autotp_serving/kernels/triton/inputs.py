"""What the kernels are given: a layer's part of the KV cache and the sequences of a step."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Pools(Protocol):
    """Keys and values of all slots of a layer, on the device.

    Attributes:
        keys, values: [num_slots, num_kv_heads, head_dim] bf16, fp16 or int8; a slot is
            block * block_size + offset.
        key_scales, value_scales: [num_slots, num_kv_heads] float32, which codes in int8 are
            multiplied by; None where the numbers are as they came.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None


class Inputs(Protocol):
    """The sequences of a step. Tensors are int32 on the device, the rest is known to the host.

    Attributes:
        rows: [num_seqs] each sequence's row of `block_tables`.
        query_starts: [num_seqs + 1] where its tokens begin in the flattened batch.
        context_lens: [num_seqs] its tokens in the cache, this step's included; 0 for padding.
        block_tables: [max_rows, max_blocks] blocks in their order.
        num_seqs, num_tokens, max_query_len: of this step, padding included.
        is_decode: whether every sequence runs a single token.
    """

    rows: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    num_seqs: int
    num_tokens: int
    max_query_len: int
    is_decode: bool

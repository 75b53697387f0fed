"""One layer's part of the KV cache, and how its numbers are rounded to int8. Every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_CODE = 127

SMALLEST_DIVISOR = 1e-30
"""Below it a row is zeros: the inverse of less would overflow."""


@dataclass(frozen=True)
class Pools:
    """Keys and values of all slots of a layer.

    Attributes:
        keys, values: [num_slots, num_kv_heads, head_dim], or in the order of a kernel.
        key_scales, value_scales: [num_slots, num_kv_heads] float32, or in the order of a kernel,
            which codes in int8 are multiplied by; None where the numbers are as they came.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All there are."""
        every = (self.keys, self.values, self.key_scales, self.value_scales)
        return tuple(tensor for tensor in every if tensor is not None)

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store rows [num_tokens, num_kv_heads, head_dim] in portable order."""
        for pool, scales, rows in (
            (self.keys, self.key_scales, key),
            (self.values, self.value_scales, value),
        ):
            if scales is not None:
                rows, row_scales = quantize(rows)
                scales.index_copy_(0, slots, row_scales)
            pool.index_copy_(0, slots, rows)

    def read(self, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of slots, [*slots.shape, num_kv_heads, head_dim], in portable order."""
        if self.key_scales is None:
            return self.keys[slots], self.values[slots]
        return (
            (self.keys[slots] * self.key_scales[slots][..., None]).to(dtype),
            (self.values[slots] * self.value_scales[slots][..., None]).to(dtype),
        )


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row [..., size] to int8 by its own largest number: the nearest, halves to even.

    A token's codes so depend on that token and head alone. NaN makes a whole row NaN.

    Returns:
        Codes [..., size], and what to multiply them by [...] in float32.
    """
    rows = rows.float()
    largest = rows.abs().amax(-1)
    # Divided by a tensor, as C++ does: torch would multiply a number by the reciprocal.
    inverse = largest.new_tensor(LARGEST_CODE) / largest.clamp(min=SMALLEST_DIVISOR)
    codes = (rows * inverse[..., None]).round().nan_to_num(0.0)
    return codes.to(torch.int8), largest / LARGEST_CODE

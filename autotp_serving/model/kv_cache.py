"""The paged KV cache: one pool of pages per layer. Every rank holds its own heads' share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autotp_serving.low_bit.kernels import huge_pages
from autotp_serving.model.kernels.cpu_attention import can_attend


@dataclass(frozen=True)
class KVCacheShape:
    """What one page costs on this rank; ranks with fewer heads have smaller pages.

    Attributes:
        head_shapes: per layer, (num_kv_heads, key_head_dim, value_head_dim) on this rank.
    """

    head_shapes: tuple[tuple[int, int, int], ...]
    block_size: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one page over all layers."""
        numbers = sum(heads * (key + value) for heads, key, value in self.head_shapes)
        return numbers * self.block_size * self.dtype.itemsize


class KVCache:
    """Keys and values of every layer, addressed by slot = page * block_size + offset."""

    def __init__(self, shape: KVCacheShape, num_blocks: int, device: torch.device) -> None:
        self.block_size = shape.block_size
        self.num_blocks = num_blocks
        self.device = device
        # Whether attention by kernels/ reads it; else portable torch does.
        self.has_kernel = all(
            can_attend(shape.dtype, device, key, value) for _, key, value in shape.head_shapes
        )
        num_slots = num_blocks * shape.block_size

        def allocate(heads: int, size: int) -> torch.Tensor:
            # Zeros, not empty: padded rows read slots that nobody wrote, and a stray NaN there
            # would survive a masked softmax. On CPU untouched pages cost no memory.
            if device.type != "cpu":
                return torch.zeros((num_slots, heads, size), dtype=shape.dtype, device=device)
            return huge_pages.zeros((num_slots, heads, size), shape.dtype)

        self._keys = [allocate(heads, key) for heads, key, _ in shape.head_shapes]
        self._values = [allocate(heads, value) for heads, _, value in shape.head_shapes]

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new rows and return the layer's whole pool.

        Args:
            slots: [num_tokens] int64.
            key: [num_tokens, num_kv_heads, key_head_dim]; value alike.

        Returns:
            Keys and values, each [num_slots, num_kv_heads, head_dim].
        """
        keys, values = self.layer(layer)
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)
        return keys, values

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's whole pool: keys and values, each [num_slots, num_kv_heads, head_dim]."""
        return self._keys[layer], self._values[layer]

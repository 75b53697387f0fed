"""The paged KV cache: one pool of pages per layer. Every rank holds its own heads' share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autotp_serving.low_bit.kernels import huge_pages
from autotp_serving.model.kernels.cpu_attention import can_attend, pool_shapes, store


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
    """Keys and values of every layer, addressed by slot = page * block_size + offset.

    Attributes:
        has_kernel: whether attention by kernels/ reads it, in an order of its own; else portable
            torch does.
    """

    def __init__(self, shape: KVCacheShape, num_blocks: int, device: torch.device) -> None:
        self.block_size = shape.block_size
        self.num_blocks = num_blocks
        self.device = device
        self.has_kernel = all(
            can_attend(shape.dtype, device, key, value, shape.block_size)
            for _, key, value in shape.head_shapes
        )
        num_slots = num_blocks * shape.block_size
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for heads, key, value in shape.head_shapes:
            shapes = ((num_slots, heads, key), (num_slots, heads, value))
            if self.has_kernel:
                shapes = pool_shapes(num_slots, heads, key, value)
            # Zeros, not empty: padded rows read slots that nobody wrote, and a stray NaN there
            # would survive a masked softmax. On CPU untouched pages cost no memory.
            allocate = huge_pages.zeros if device.type == "cpu" else torch.zeros
            with device:
                self._layers.append(tuple(allocate(size, dtype=shape.dtype) for size in shapes))

    @property
    def num_bytes(self) -> int:
        """Of all pools."""
        return sum(pool.nbytes for pools in self._layers for pool in pools)

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new rows and return the layer's whole pool.

        Args:
            slots: [num_tokens] int64.
            key: [num_tokens, num_kv_heads, key_head_dim]; value alike.

        Returns:
            Keys and values, as `layer` does.
        """
        keys, values = self._layers[layer]
        if self.has_kernel:
            store(slots, key, value, keys, values)
        else:
            keys.index_copy_(0, slots, key)
            values.index_copy_(0, slots, value)
        return keys, values

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values: each [num_slots, num_kv_heads, head_dim], or as the kernel's
        `pool_shapes` has them.
        """
        return self._layers[layer]

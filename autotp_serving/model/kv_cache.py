"""The paged KV cache: one pool of blocks per layer. Every rank holds its own heads' share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autotp_serving.devices import huge_pages
from autotp_serving.kernels.cpu.attention import can_attend, pool_shapes, store
from autotp_serving.kernels.kv_pools import Pools
from autotp_serving.model.shapes import count_head_bytes


@dataclass(frozen=True)
class KVCacheShape:
    """What one block costs on this rank; ranks with fewer heads have smaller blocks.

    Attributes:
        head_shapes: per layer, (num_kv_heads, key_head_dim, value_head_dim) on this rank.
        dtype: of the keys and values that come in, and that attention computes with.
        is_int8: whether they are rounded to int8, with a scale for each token and head.
    """

    head_shapes: tuple[tuple[int, int, int], ...]
    block_size: int
    dtype: torch.dtype
    is_int8: bool = False

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        itemsize = self.dtype.itemsize
        return self.block_size * sum(
            heads * count_head_bytes(key, value, itemsize, self.is_int8)
            for heads, key, value in self.head_shapes
        )

    @property
    def stored_dtype(self) -> torch.dtype:
        """What the pools are of."""
        return torch.int8 if self.is_int8 else self.dtype


class KVCache:
    """Keys and values of every layer, addressed by slot = block * block_size + offset.

    Attributes:
        is_int8: see `KVCacheShape`.
        has_kernel: whether attention by kernels/ reads it, in an order of its own; else portable
            torch does.
    """

    def __init__(self, shape: KVCacheShape, num_blocks: int, device: torch.device) -> None:
        self.block_size = shape.block_size
        self.num_blocks = num_blocks
        self.device = device
        self.is_int8 = shape.is_int8
        self.has_kernel = all(
            can_attend(shape.dtype, device, key, value, shape.block_size, shape.is_int8)
            for _, key, value in shape.head_shapes
        )
        num_slots = num_blocks * shape.block_size
        self._layers: list[Pools] = []
        for heads, key, value in shape.head_shapes:
            if self.has_kernel:
                sizes, scale_size = pool_shapes(num_slots, heads, key, value)
            else:
                sizes = ((num_slots, heads, key), (num_slots, heads, value))
                scale_size = (num_slots, heads)
            wanted = [(size, shape.stored_dtype) for size in sizes]
            if shape.is_int8:
                wanted += [(scale_size, torch.float32)] * 2
            # Zeros, not empty: padded rows read slots that nobody wrote, and a stray NaN there
            # would survive a masked softmax. On CPU untouched blocks cost no memory.
            allocate = huge_pages.zeros if device.type == "cpu" else torch.zeros
            with device:
                self._layers.append(Pools(*(allocate(size, dtype=dtype) for size, dtype in wanted)))

    @property
    def num_bytes(self) -> int:
        """Of all pools."""
        return sum(tensor.nbytes for pools in self._layers for tensor in pools.tensors)

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Pools:
        """Store new rows and return the layer's whole pool.

        Args:
            slots: [num_tokens] int64.
            key: [num_tokens, num_kv_heads, key_head_dim]; value alike.
        """
        pools = self._layers[layer]
        if self.has_kernel:
            store(slots, key, value, pools)
        else:
            pools.write(slots, key, value)
        return pools

    def layer(self, layer: int) -> Pools:
        """A layer's keys and values; in the kernel's order where there is one."""
        return self._layers[layer]

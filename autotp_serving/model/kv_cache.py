"""The paged KV cache: one pool of blocks per layer. Every rank holds its own heads' share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from autotp_serving.kernels.kv_pools import Pools
from autotp_serving.model.shapes import count_head_bytes
from autotp_serving.model.step_inputs import StepInputs


@dataclass(frozen=True)
class KVCacheShape:
    """What one block costs on this rank; ranks with fewer heads have smaller blocks.

    Attributes:
        head_shapes: per layer, (num_kv_heads, key_head_dim, value_head_dim) on this rank.
        dtype: of the keys and values that come in, and that attention computes with.
        is_int8: whether they are rounded to int8, with a scale for each token and head.
        sources: whose keys and values each layer reads; () for its own. One that reads another's
            has no heads.
        is_sparse: attention sees chosen tokens, and the last layers are of indexers' keys
            (`token_choice.py`): it takes kernels that can do this.
    """

    head_shapes: tuple[tuple[int, int, int], ...]
    block_size: int
    dtype: torch.dtype
    is_int8: bool = False
    sources: tuple[int, ...] = ()
    is_sparse: bool = False

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


class Attention(Protocol):
    """Attends for all sequences of one step, in layer after layer."""

    def attend(
        self,
        query: Tensor,
        new: tuple[Tensor, Tensor],
        pools: Pools,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend in one layer.

        Args:
            query: [num_tokens, num_heads, head_dim].
            new: the tokens' own keys and values, [num_tokens, num_kv_heads, head_dim].
            pools: the layer's, with the new.
            sliding_window: how many of the latest positions are visible; None for all.
            softcap: logits become softcap * tanh(logits / softcap); None for as they are.
            sinks: [num_heads], a logit of each head that has no value; None for none.

        Returns:
            [num_tokens, num_heads, value_head_dim].
        """
        ...


class CacheKernels(Protocol):
    """Who lays out a KV cache, writes it and attends over it: one for all three."""

    def allocate_kv(self, shape: KVCacheShape, num_slots: int, device: torch.device) -> list[Pools]:
        """Pools of each layer, of zeros: what nobody wrote may be read and masked, NaN would not
        stay masked.
        """
        ...

    def store(self, slots: Tensor, key: Tensor, value: Tensor, pools: Pools) -> None:
        """Store rows [num_tokens, num_kv_heads, head_dim] in a layer's slots [num_tokens]."""
        ...

    def attention(self, inputs: StepInputs, block_size: int, is_int8: bool) -> Attention:
        """Get ready for a step; once, for all layers."""
        ...


class KVCache:
    """Keys and values of every layer, addressed by slot = block * block_size + offset.

    Attributes:
        is_int8: see `KVCacheShape`.
        kernels: who reads and writes it, in an order of their own.
    """

    def __init__(
        self, shape: KVCacheShape, num_blocks: int, device: torch.device, kernels: CacheKernels
    ) -> None:
        self.block_size = shape.block_size
        self.num_blocks = num_blocks
        self.device = device
        self.is_int8 = shape.is_int8
        self.kernels = kernels
        self._layers = kernels.allocate_kv(shape, num_blocks * shape.block_size, device)
        self._sources = shape.sources or range(len(self._layers))

    @property
    def num_bytes(self) -> int:
        """Of all pools."""
        return sum(tensor.nbytes for pools in self._layers for tensor in pools.tensors)

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Pools:
        """Store new rows and return the layer's whole pool.

        A layer that reads another's keys and values is given those, which are stored already.

        Args:
            slots: [num_tokens] int64.
            key: [num_tokens, num_kv_heads, key_head_dim]; value alike.
        """
        source = self._sources[layer]
        pools = self._layers[source]
        if source == layer:
            self.kernels.store(slots, key, value, pools)
        return pools

    def view_blocks(self) -> list[Tensor]:
        """The bytes of all pools, [num_blocks, bytes] uint8 each; a row of every one is a block."""
        tensors = [tensor for pools in self._layers for tensor in pools.tensors]
        return [one.view(self.num_blocks, -1).view(torch.uint8) for one in tensors if len(one)]

    def describe_blocks(self) -> str:
        """The types and sizes of what a block is made of."""
        tensors = [tensor for pools in self._layers for tensor in pools.tensors]
        return str([(one.dtype, tuple(one.shape[1:]), self.block_size) for one in tensors])

    def layer(self, layer: int) -> Pools:
        """A layer's keys and values, in the kernels' order."""
        return self._layers[layer]

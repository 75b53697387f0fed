"""Which kernels run the model on this rank's device: one choice, made once. Every rank.

A backend answers for the KV cache and attention, the forward pass, low-bit products and sampling;
where it has nothing of its own for a model or a machine, it answers with the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from autotp_serving.config import ServingConfig
from autotp_serving.devices import huge_pages
from autotp_serving.distributed.launch import RankGroup
from autotp_serving.kernels.cpu.attention import CpuCache, can_attend
from autotp_serving.kernels.cpu.recurrence import load_recurrence
from autotp_serving.kernels.reference.attention import ReferenceCache
from autotp_serving.kernels.reference.recurrence import Recurrence, ReferenceRecurrence
from autotp_serving.layers.low_bit_linear import Products, choose_products
from autotp_serving.model.batch_state import BatchState
from autotp_serving.model.forward import Forward, PlainForward
from autotp_serving.model.fused_layers import fuse
from autotp_serving.model.kv_cache import CacheKernels, KVCache, KVCacheShape
from autotp_serving.worker.logprobs import Fetch
from autotp_serving.worker.sampler import Sampler


@dataclass(frozen=True)
class PassSetup:
    """What a forward pass is made for.

    Attributes:
        state: whose inputs it will be given.
        all_reduce: sums a tensor over the ranks, in place.
        is_causal: tokens see those before them only.
    """

    config: ServingConfig
    max_model_len: int
    state: BatchState
    all_reduce: Callable[[torch.Tensor], torch.Tensor]
    group: RankGroup
    is_causal: bool = True

    @property
    def by_operation(self) -> bool:
        """Whether the operations of a layer are to run one by one, so that each can be timed."""
        return self.config.profile is not None


class Backend(Protocol):
    """The kernels of one kind of device.

    Attributes:
        linear: multiplies by low-bit weights.
    """

    linear: Products

    def recurrence(self) -> Recurrence:
        """What mixes tokens in layers that keep states."""
        ...

    def cache(self, shape: KVCacheShape, *, is_causal: bool = True) -> CacheKernels:
        """Who lays out, writes and reads a KV cache of this shape.

        Args:
            is_causal: tokens see those before them only.
        """
        ...

    def layer(self, model: nn.Module, cache: KVCache, setup: PassSetup) -> Forward:
        """The forward pass over a loaded model; all ranks must ask for it together."""
        ...

    def sampler(self, fetch: Fetch) -> Sampler:
        """What chooses tokens on rank 0."""
        ...


class ReferenceBackend:
    """Portable torch and transformers' own layers, on any device."""

    def __init__(self, device: torch.device) -> None:
        self.linear = choose_products(device)

    def recurrence(self) -> Recurrence:
        """See Backend."""
        return ReferenceRecurrence()

    def cache(self, shape: KVCacheShape, *, is_causal: bool = True) -> CacheKernels:
        """See Backend."""
        return ReferenceCache(is_causal=is_causal)

    def layer(self, model: nn.Module, cache: KVCache, setup: PassSetup) -> Forward:
        """See Backend."""
        return PlainForward(model, cache)

    def sampler(self, fetch: Fetch) -> Sampler:
        """See Backend."""
        return Sampler(fetch)


class CpuBackend(ReferenceBackend):
    """Kernels for AVX-512 and AVX2, compiled here at first use."""

    def recurrence(self) -> Recurrence:
        """See Backend."""
        return load_recurrence()

    def cache(self, shape: KVCacheShape, *, is_causal: bool = True) -> CacheKernels:
        """See Backend."""
        fits = not shape.is_sparse and all(
            can_attend(shape.dtype, key, value, shape.block_size, shape.is_int8)
            for _, key, value in shape.head_shapes
        )
        if fits:
            return CpuCache(is_causal=is_causal)
        return ReferenceCache(huge_pages.zeros, is_causal=is_causal)

    def layer(self, model: nn.Module, cache: KVCache, setup: PassSetup) -> Forward:
        """See Backend."""
        fused = fuse(model, cache, by_operation=setup.by_operation)
        return fused or super().layer(model, cache, setup)


class CudaBackend(ReferenceBackend):
    """Kernels in CUDA and Triton, and graphs of decode steps."""

    def layer(self, model: nn.Module, cache: KVCache, setup: PassSetup) -> Forward:
        """See Backend."""
        from autotp_serving.model.gpu_forward import open_gpu_forward

        quick = None
        if not setup.by_operation and setup.is_causal:
            quick = open_gpu_forward(
                model,
                cache,
                setup.state,
                setup.config,
                setup.max_model_len,
                setup.all_reduce,
                setup.group,
            )
        return quick or super().layer(model, cache, setup)


def choose_backend(device: torch.device) -> Backend:
    """The device's own backend, or the reference."""
    return {"cpu": CpuBackend, "cuda": CudaBackend}.get(device.type, ReferenceBackend)(device)

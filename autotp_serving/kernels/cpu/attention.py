"""Attention over the paged cache by csrc/, for AVX-512 and AVX2. Every rank on CPU.

Keys and values, bfloat16 or int8, are read where they lie, block by block. A token's result is
bitwise the same with any number of threads, in any batch and however its prompt was cut into
chunks.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autotp_serving.devices import huge_pages
from autotp_serving.devices.build import BuildError, best_isa, build_library, isa_flags
from autotp_serving.kernels.kv_pools import Pools

if TYPE_CHECKING:
    from autotp_serving.model.kv_cache import KVCacheShape
    from autotp_serving.model.step_inputs import StepInputs

logger = logging.getLogger(__name__)

GROUP = 16
"""Slots that lie together; a block must be a multiple of it."""

SOURCE = Path(__file__).parent / "csrc" / "paged_attention.cpp"


LARGEST_INT8_HEAD = 512
"""Beyond it the sum of a query's 16-bit words times 8-bit codes would not fit in 32 bits."""


class PoolPointers(ctypes.Structure):
    """AutotpPools of csrc/kv_layout.h."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
    )

    @staticmethod
    def of(pools: Pools) -> PoolPointers:
        """Where a layer's pools, in the kernel's order, lie; without scales they are bfloat16."""
        return PoolPointers(*(tensor.data_ptr() for tensor in pools.tensors))


class _Attention(ctypes.Structure):
    """AutotpAttention of csrc/paged_attention.h."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("query_token_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("pools", PoolPointers),
        ("out", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("sequences", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
    )


class CpuCache:
    """See CacheKernels; for caches that `can_attend`.

    Args:
        is_causal: tokens see those before them only, else all of their step; then a sequence is in
            one step as a whole.
    """

    def __init__(self, *, is_causal: bool = True) -> None:
        self._is_causal = is_causal

    def allocate_kv(self, shape: KVCacheShape, num_slots: int, device: torch.device) -> list[Pools]:
        """See CacheKernels; untouched blocks cost no memory."""
        layers = []
        for heads, key, value in shape.head_shapes:
            sizes, scale_size = pool_shapes(num_slots, heads, key, value)
            wanted = [(size, shape.stored_dtype) for size in sizes]
            if shape.is_int8:
                wanted += [(scale_size, torch.float32)] * 2
            layers.append(Pools(*(huge_pages.zeros(size, dtype=dtype) for size, dtype in wanted)))
        return layers

    def store(self, slots: Tensor, key: Tensor, value: Tensor, pools: Pools) -> None:
        """See CacheKernels."""
        store(slots, key, value, pools)

    def attention(self, inputs: StepInputs, block_size: int, is_int8: bool) -> CpuAttention:
        """See CacheKernels."""
        return CpuAttention(inputs if self._is_causal else spread(inputs), block_size)


def spread(inputs: StepInputs) -> StepInputs:
    """Let each token be a sequence of its own over the whole of its context.

    Each then sees all of it, as its step has stored the keys and values of all before it attends.
    """
    lens = torch.tensor(inputs.host_query_lens)
    num_tokens = inputs.num_tokens
    return replace(
        inputs,
        rows=inputs.rows.repeat_interleave(lens),
        query_starts=torch.arange(num_tokens + 1, dtype=torch.int32),
        context_lens=inputs.context_lens.repeat_interleave(lens),
        num_seqs=num_tokens,
    )


def can_attend(
    dtype: torch.dtype, head_dim: int, value_dim: int, block_size: int, is_int8: bool
) -> bool:
    """Whether `CpuAttention` takes a cache of this kind; `dtype` is that of the activations."""
    return (
        dtype == torch.bfloat16
        and head_dim % 32 == 0
        and value_dim % 16 == 0
        and block_size % GROUP == 0
        and not (is_int8 and max(head_dim, value_dim) > LARGEST_INT8_HEAD)
        and load_library() is not None
    )


def pool_shapes(
    num_slots: int, num_kv_heads: int, head_dim: int, value_dim: int
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]:
    """The shapes of a layer's keys and values in the order that the products take, and of scales.

    16 slots make a group; within it words are of two numbers of a key, and of two slots' values:
    keys [group, head, head_dim / 2, slot of 16, 2], values [group, head, slot / 2, value_dim, 2];
    scales of either are [group, head, slot of 16].
    """
    groups = num_slots // GROUP
    return (
        (groups, num_kv_heads, head_dim // 2, GROUP, 2),
        (groups, num_kv_heads, GROUP // 2, value_dim, 2),
    ), (groups, num_kv_heads, GROUP)


def store(slots: Tensor, key: Tensor, value: Tensor, pools: Pools) -> None:
    """Store tokens' keys and values in a layer's pools.

    Args:
        slots: [num_tokens] int64.
        key: [num_tokens, num_kv_heads, head_dim] bfloat16; only its last dimension must be dense.
        value: [num_tokens, num_kv_heads, value_dim], likewise.
        pools: as `pool_shapes` has them.
    """
    key = key if key.stride(2) == 1 else key.contiguous()
    value = value if value.stride(2) == 1 else value.contiguous()
    pointers = PoolPointers.of(pools)
    load_library().autotp_store(
        key.data_ptr(),
        key.stride(0),
        key.stride(1),
        value.data_ptr(),
        value.stride(0),
        value.stride(1),
        slots.data_ptr(),
        ctypes.addressof(pointers),
        *key.shape,
        value.shape[2],
    )


class CpuAttention:
    """Causal attention of one step's tokens over the blocks of their sequences, for every layer.

    Args:
        inputs: the step's; its tensors are read where they lie.
        block_size: tokens a block holds, a multiple of 16.
        isa: of `ISAS`, for tests; None for the best.
    """

    def __init__(self, inputs: StepInputs, block_size: int, *, isa: str | None = None) -> None:
        self._inputs = inputs  # whose memory the call points to
        library = load_library() if isa is None else load_library(isa)
        self._attend = library.autotp_paged_attention
        self._call = _Attention(
            tables=inputs.block_tables.data_ptr(),
            table_stride=inputs.block_tables.shape[1],
            rows=inputs.rows.data_ptr(),
            context_lens=inputs.context_lens.data_ptr(),
            starts=inputs.query_starts.data_ptr(),
            sequences=inputs.num_seqs,
            block_size=block_size,
        )
        # Of the call and of the function that takes it, for C++ that attends by itself.
        self.address = ctypes.addressof(self._call)
        self.function = ctypes.cast(self._attend, ctypes.c_void_p).value

    def attend(
        self,
        query: Tensor,
        new: tuple[Tensor, Tensor] | None,
        pools: Pools,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend in one layer; the tokens' own keys and values must be in the cache already.

        Args:
            query: [num_tokens, num_heads, head_dim] bfloat16, the sequences' tokens one after
                another. Only its last dimension must be dense.
            new: not read; the cache has them.
            pools: the layer's, as `pool_shapes` has them.
            sliding_window: how many of the latest positions are visible; None for all.
            softcap: logits become softcap * tanh(logits / softcap); None for as they are.
            sinks: [num_heads], a logit of each head that has no value.

        Returns:
            [num_tokens, num_heads, value_dim] bfloat16, dense.
        """
        num_tokens, num_heads, head_dim = query.shape
        if query.stride(2) != 1:
            query = query.contiguous()
        value_dim = pools.values.shape[3]
        out = query.new_empty(num_tokens, num_heads, value_dim)
        call = self._call
        call.query = query.data_ptr()
        call.query_token_stride, call.query_head_stride, _ = query.stride()
        call.pools, call.out = PoolPointers.of(pools), out.data_ptr()
        call.heads, call.kv_heads = num_heads, pools.keys.shape[1]
        call.head_dim, call.value_dim = head_dim, value_dim
        call.window, call.scaling, call.softcap = sliding_window or 0, scaling, softcap or 0.0
        sinks = None if sinks is None else sinks.float().contiguous()
        call.sinks = None if sinks is None else sinks.data_ptr()
        if self._attend(self.address, torch.get_num_threads()):
            raise MemoryError(f"no memory to attend with {num_tokens} tokens")
        return out


@functools.cache
def load_library(isa: str | None = None) -> ctypes.CDLL | None:
    """The compiled kernel for the best instruction set here (or the named one).

    None, and a line in the log, where there is none.
    """
    try:
        flags = isa_flags(isa or best_isa())
        library = ctypes.CDLL(str(build_library("paged_attention", SOURCE, flags)))
    except (BuildError, OSError) as error:
        logger.warning("Attention is done by portable torch, slowly: %s", error)
        return None
    library.autotp_paged_attention.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    library.autotp_paged_attention.restype = ctypes.c_int
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.autotp_store.argtypes = (
        *(pointer, number, number, pointer, number, number),
        *(pointer, pointer, number, number, number, number),
    )
    library.autotp_store.restype = None
    return library

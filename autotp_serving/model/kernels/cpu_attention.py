"""Attention over the paged cache by csrc/, for AVX-512 and AVX2. Every rank on CPU.

bfloat16 keys and values are read where they lie, page by page. A token's result is bitwise the
same with any number of threads, in any batch and however its prompt was cut into chunks.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from autotp_serving.native_build import BuildError, best_isa, build_library, isa_flags

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "paged_attention.cpp"


class _Attention(ctypes.Structure):
    """AutotpAttention of csrc/paged_attention.cpp."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("query_token_stride", ctypes.c_int64),
        ("query_head_stride", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
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
    )


def can_attend(dtype: torch.dtype, device: torch.device, head_dim: int, value_dim: int) -> bool:
    """Whether `CpuAttention` takes a cache of this kind."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and head_dim % 32 == 0
        and value_dim % 16 == 0
        and load_library() is not None
    )


class CpuAttention:
    """Causal attention of one step's tokens over the pages of their sequences, for every layer.

    Args:
        block_tables: [num_seqs] lists of pages.
        context_lens: [num_seqs], the step's tokens included.
        query_lens: [num_seqs], how many of the context's last tokens the step runs.
        block_size: tokens a page holds.
        isa: of `ISAS`, for tests; None for the best.
    """

    def __init__(
        self,
        block_tables: Sequence[Sequence[int]],
        context_lens: Sequence[int],
        query_lens: Sequence[int],
        block_size: int,
        *,
        isa: str | None = None,
    ) -> None:
        most_pages = max(map(len, block_tables))
        flat = array("i")
        for table in block_tables:
            flat.extend(table)
            flat.extend([0] * (most_pages - len(table)))
        self._tables = flat
        self._context_lens = array("i", context_lens)
        self._starts = array("i", itertools.accumulate(query_lens, initial=0))
        self._attend = load_library(isa).autotp_paged_attention
        self._call = _Attention(
            tables=flat.buffer_info()[0],
            table_stride=most_pages,
            context_lens=self._context_lens.buffer_info()[0],
            starts=self._starts.buffer_info()[0],
            sequences=len(self._context_lens),
            block_size=block_size,
        )
        self._address = ctypes.addressof(self._call)

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Attend in one layer; the tokens' own keys and values must be in the cache already.

        Args:
            query: [num_tokens, num_heads, head_dim] bfloat16, the sequences' tokens one after
                another. Only its last dimension must be dense.
            keys: [num_slots, num_kv_heads, head_dim], slot = page * block_size + offset.
            values: [num_slots, num_kv_heads, value_dim].
            sliding_window: how many of the latest positions are visible; None for all.
            softcap: logits become softcap * tanh(logits / softcap); None for as they are.

        Returns:
            [num_tokens, num_heads, value_dim] bfloat16, dense.
        """
        num_tokens, num_heads, head_dim = query.shape
        if query.stride(2) != 1:
            query = query.contiguous()
        out = query.new_empty(num_tokens, num_heads, values.shape[2])
        call = self._call
        call.query = query.data_ptr()
        call.query_token_stride, call.query_head_stride, _ = query.stride()
        call.keys, call.values, call.out = keys.data_ptr(), values.data_ptr(), out.data_ptr()
        call.heads, call.kv_heads = num_heads, keys.shape[1]
        call.head_dim, call.value_dim = head_dim, values.shape[2]
        call.window, call.scaling, call.softcap = sliding_window or 0, scaling, softcap or 0.0
        if self._attend(self._address, torch.get_num_threads()):
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
    return library

"""Attention over the paged cache by csrc/, for AVX-512 and AVX2. Every rank on CPU.

bfloat16 keys and values are read where they lie. A token's result is bitwise the same with any
number of threads, in any batch and however its prompt was cut into chunks.
"""

from __future__ import annotations

import ctypes
import functools
import logging
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


def can_attend(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `paged_attention_cpu` takes these; see there for their shapes."""
    return (
        query.device.type == "cpu"
        and query.dtype == keys.dtype == values.dtype == torch.bfloat16
        and keys.shape[2] % 32 == 0
        and values.shape[2] % 16 == 0
        and keys.is_contiguous()
        and values.is_contiguous()
        and load_library() is not None
    )


def paged_attention_cpu(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    block_size: int,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
    *,
    isa: str | None = None,
) -> Tensor:
    """Attend causally over the pages of each sequence, as `can_attend` allows.

    The tokens' own keys and values must be in the cache already.

    Args:
        query: [num_tokens, num_heads, head_dim] bfloat16, the sequences' tokens one after another,
            each sequence's the last of its context. Only its last dimension must be dense.
        keys: [num_slots, num_kv_heads, head_dim], slot = page * block_size + offset.
        values: [num_slots, num_kv_heads, value_dim].
        block_tables: [num_seqs, most_pages] int32; what lies beyond a context is not read.
        context_lens: [num_seqs] int32.
        query_starts: [num_seqs + 1] int32, from 0 to num_tokens.
        sliding_window: how many of the latest positions are visible; None for all.
        softcap: logits become softcap * tanh(logits / softcap); None for as they are.
        out: dense [num_tokens, num_heads, value_dim] bfloat16 to fill, or None for a new one.
        isa: of `ISAS`, for tests; None for the best.
    """
    num_tokens, num_heads, head_dim = query.shape
    if query.stride(2) != 1:
        query = query.contiguous()
    if out is None:
        out = query.new_empty(num_tokens, num_heads, values.shape[2])
    call = _Attention(
        query=query.data_ptr(),
        query_token_stride=query.stride(0),
        query_head_stride=query.stride(1),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        out=out.data_ptr(),
        tables=block_tables.data_ptr(),
        table_stride=block_tables.stride(0),
        context_lens=context_lens.data_ptr(),
        starts=query_starts.data_ptr(),
        sequences=len(context_lens),
        heads=num_heads,
        kv_heads=keys.shape[1],
        head_dim=head_dim,
        value_dim=values.shape[2],
        block_size=block_size,
        window=sliding_window or 0,
        scaling=scaling,
        softcap=softcap or 0.0,
    )
    library = load_library(isa)
    if library.autotp_paged_attention(ctypes.byref(call), torch.get_num_threads()):
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

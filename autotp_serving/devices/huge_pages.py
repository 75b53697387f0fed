"""Host memory for weights and the KV cache in huge pages. Every rank on CPU.

A weight read from front to back needs a translation for each 4 KiB, and in a virtual machine each
is a walk through two tables: huge pages make the reading half as fast again. Weights are laid one
behind the other in large pieces, since most are smaller than a few huge pages.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 2**21
PIECE = 2**25
LINE = 64

_lock = threading.Lock()
_piece = torch.empty(0, dtype=torch.uint8)


def empty_like(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype; its memory is freed with that of its neighbours."""
    return zeros(tensor.shape, tensor.dtype)


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The same for a shape and dtype. Pages that nobody touches cost nothing."""
    global _piece
    num_bytes = math.prod(shape) * dtype.itemsize
    with _lock:
        if len(_piece) < num_bytes:
            _piece = _map_piece(max(num_bytes, PIECE))
        memory = _piece[:num_bytes]
        _piece = _piece[-(-num_bytes // LINE) * LINE :]
    return memory.view(dtype).view(shape)


def _map_piece(num_bytes: int) -> Tensor:
    """Fresh memory that starts with a huge page; pages nobody touches cost nothing."""
    mapped = mmap.mmap(-1, num_bytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    return memory[-memory.data_ptr() % PAGE :]

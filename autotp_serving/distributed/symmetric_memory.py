"""Memory that the CUDA cards of one host share, and all-reduce by it. Every rank of a CUDA server.

Each card reads what the others hold straight over NVLink, in one kernel that also waits for them:
for the few kilobytes of a decode step that is half of what NCCL takes, and a CUDA graph can hold
it. NVLink multicast is not used, as a program that ends badly in it can take other programs' cards
along. Above `LARGEST_BYTES` NCCL is as quick.
"""

from __future__ import annotations

import logging
import os

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

LARGEST_BYTES = 2**20
ONE_SHOT_BYTES = 2**17
"""Up to here each card sums everything itself; above, each sums a part and the parts are shared."""

ALIGNMENT = 16
"""Bytes that the kernels move at once: sizes must be multiples of it."""


def share(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
) -> tuple[Tensor, list[int]]:
    """Memory of this card that the others of the group can reach, and everyone's addresses here.

    Every rank must ask for the same; each keeps the tensor as long as any uses the memory.

    Raises:
        RuntimeError: the cards cannot reach one another's memory; the same on every rank, since
            they rendezvous.
    """
    # Before the first allocation: torch would try multicast where the driver offers it.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed._symmetric_memory as symmetric_memory

    own = symmetric_memory.empty(shape, dtype=dtype, device=device)
    handle = symmetric_memory.rendezvous(own, group.group_name)
    parts = [handle.get_buffer(rank, shape, dtype) for rank in range(group.size())]
    return own, [part.data_ptr() for part in parts]


class SymmetricAllReduce:
    """Sums tensors over the ranks, in place, up to `LARGEST_BYTES` of one type.

    Args:
        group: of ranks that are all on this host.

    Raises:
        RuntimeError: see `share`.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype) -> None:
        self._group_name = group.group_name
        self._num_ranks = group.size()
        self._buffer, _ = share((LARGEST_BYTES // dtype.itemsize,), dtype, device, group)

    def takes(self, tensor: Tensor) -> bool:
        """Whether the tensor is small enough, contiguous and of the right type."""
        return (
            tensor.dtype == self._buffer.dtype
            and tensor.nbytes <= LARGEST_BYTES
            and tensor.nbytes % (ALIGNMENT * self._num_ranks) == 0
            and tensor.is_contiguous()
        )

    def __call__(self, tensor: Tensor) -> Tensor:
        """Sum a tensor that `takes` lets pass, in place; can be captured in a CUDA graph."""
        flat = tensor.view(-1)
        buffer = self._buffer[: flat.numel()]
        if tensor.nbytes <= ONE_SHOT_BYTES:
            torch.ops.symm_mem.one_shot_all_reduce_copy_out(
                buffer, flat, "sum", self._group_name, flat
            )
        else:
            buffer.copy_(flat)
            torch.ops.symm_mem.two_shot_all_reduce_out(buffer, "sum", self._group_name, flat)
        return tensor

"""RMS norms with the sum before them, over the ranks too, by csrc/norms.cu. Ranks on CUDA."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.kernels.cuda.activations import CHUNK, Activations, Rounding
from autotp_serving.kernels.cuda.nvrtc import Long, load_kernel

SOURCE = "norms.cu"
MOST_THREADS = 1024
MOST_RANKS = 8
"""More parts of a row than that are too many for a thread's registers."""

TURNS = 2
EMPTY = -1
"""As int32, what has not arrived yet: a pair of NaN that the kernel never sends."""


@dataclass(frozen=True)
class Inboxes:
    """Where the ranks of one host put their parts of a sum for each other.

    Attributes:
        own: [TURNS, num_ranks, rows, size] bfloat16 of this card, `EMPTY` when all begin.
        addresses: of every rank's, as this card reaches them, 8 bytes each.
        turns: [rows] int32, zeros when all begin.
    """

    own: Tensor
    addresses: bytes
    turns: Tensor
    rank: int

    @property
    def num_ranks(self) -> int:
        """How many cards there are."""
        return self.own.shape[1]

    def takes(self, part: Tensor) -> bool:
        """Whether a part [num_tokens, size] of a sum has room."""
        return len(part) <= self.own.shape[2] and part.is_contiguous()

    @staticmethod
    def make(own: Tensor, addresses: list[int], rank: int) -> Inboxes:
        """Fill `own`, [TURNS, num_ranks, rows, size] bfloat16, which other ranks' cards can reach.

        No rank may use it before all have made theirs.
        """
        own.view(torch.int32).fill_(EMPTY)
        turns = torch.zeros(own.shape[2], dtype=torch.int32, device=own.device)
        torch.cuda.synchronize(own.device)
        return Inboxes(own, struct.pack(f"{len(addresses)}Q", *addresses), turns, rank)


def add_rms_norm(
    hidden: Tensor,
    added: Tensor | None,
    weight: Tensor,
    epsilon: float,
    rounding: Rounding,
    bias: Tensor | None = None,
    inboxes: Inboxes | None = None,
) -> Activations:
    """`hidden += added + bias` in place, then its RMS norm times `weight`.

    Args:
        hidden: [num_tokens, size] bfloat16.
        added: of the same shape, or None.
        weight: [size] bfloat16.
        bias: [size] bfloat16, or None.
        inboxes: where they are given, `added` is this rank's part of what is added, they take it,
            and all ranks must call this together.
    """
    num_tokens, columns = hidden.shape
    to = Activations.empty(num_tokens, columns, rounding, hidden.device)
    # A whole number of warps: a block of 64 then never spans two passes of the loop.
    threads = min(MOST_THREADS, -(-columns // CHUNK // 32) * 32)
    thread_blocks, exchange = num_tokens, (None, None, 0, Long(0), bytes(8))
    if inboxes is not None:
        thread_blocks = min(num_tokens, _count_running(hidden.device.index, threads))
        rows = Long(inboxes.own.shape[2])
        exchange = (inboxes.own, inboxes.turns, inboxes.rank, rows, inboxes.addresses)
    num_ranks = 1 if inboxes is None else inboxes.num_ranks
    load_kernel(SOURCE, "add_rms_norm", (("RANKS", str(num_ranks)),), hidden.device.index)(
        (thread_blocks, 1),
        threads,
        (
            *(hidden, added, bias, weight, float(epsilon), Long(columns), num_tokens),
            *(to.codes, to.scales, to.sums, to.numbers, rounding.way),
            *exchange,
        ),
        shared_bytes=columns * 2,
    )
    return to


@functools.cache
def _count_running(device_index: int, threads: int) -> int:
    """Thread blocks that any card with so many multiprocessors runs at once."""
    processors = torch.cuda.get_device_properties(device_index).multi_processor_count
    return processors * min(16, MOST_THREADS // threads)

"""Sums over the ranks between a layer's pieces, and the norms that follow. Ranks on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.distributed.collectives import open_between_cards
from autotp_serving.distributed.launch import RankGroup
from autotp_serving.kernels.cuda.activations import Activations, Rounding
from autotp_serving.kernels.cuda.norms import MOST_RANKS, TURNS, Inboxes, add_rms_norm
from autotp_serving.model.fused_layers import Norm

AllReduce = Callable[[Tensor], Tensor]

MOST_RECEIVED_BYTES = 2**23
"""What the others send a rank of a sum that is taken with the norm, by one kernel, at most.

Between two cards that takes two thirds of what NCCL and a norm take, and less of fewer bytes.
"""


@dataclass(frozen=True)
class Addend:
    """What is still to be added to the hidden state.

    Attributes:
        part: [num_tokens, size] bfloat16, this rank's part of the sum; may be altered.
        bias: [size], added once for all ranks, or None.
    """

    part: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class AddNorm:
    """Adds to the hidden state what the ranks computed, and norms it.

    Attributes:
        reduce: sums a tensor over the ranks, in place; None: there is one rank.
        inboxes: for sums that are small enough, where the cards reach each other's memory.
    """

    reduce: AllReduce | None
    inboxes: Inboxes | None

    def __call__(
        self, hidden: Tensor, added: Addend | None, norm: Norm, rounding: Rounding
    ) -> Activations:
        """The norm of `hidden`, [num_tokens, size], after `added` has been added to it in place."""
        if added is None:
            return add_rms_norm(hidden, None, norm.weight, norm.epsilon, rounding)
        part, inboxes = added.part, self.inboxes
        if inboxes is not None and not inboxes.takes(part):
            inboxes = None
        if self.reduce is not None and inboxes is None:
            part = self.reduce(part)
        return add_rms_norm(hidden, part, norm.weight, norm.epsilon, rounding, added.bias, inboxes)


def open_inboxes(group: RankGroup, size: int, most_tokens: int) -> Inboxes | None:
    """Inboxes for rows of `size` numbers, or None where they do not pay or the cards cannot.

    All ranks must call it.

    Args:
        most_tokens: of a step.
    """
    if not 1 < group.size <= MOST_RANKS or group.local_size < group.size:
        return None
    of_token = (group.size - 1) * size * torch.bfloat16.itemsize
    rows = min(most_tokens, MOST_RECEIVED_BYTES // of_token)
    from autotp_serving.distributed.symmetric_memory import share

    def make(world: torch.distributed.ProcessGroup, device: torch.device) -> Inboxes:
        shape = (TURNS, group.size, rows, size)
        own, addresses = share(shape, torch.bfloat16, device, world)
        return Inboxes.make(own, addresses, group.rank)

    return open_between_cards(group, make, "sums and norms are kernels of their own")

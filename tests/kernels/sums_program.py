"""Sums over cards with the norm after them, beside the same in torch. Every rank, under torchrun.

Ranks run unevenly, numbers of tokens change from call to call, some calls are in a graph: nothing
may be lost, mixed up or differ between ranks. Prints one line on rank 0.
"""

from __future__ import annotations

import os
import random

import torch
import torch.distributed as dist

from autotp_serving.distributed.symmetric_memory import share
from autotp_serving.kernels.cuda.activations import Rounding
from autotp_serving.kernels.cuda.norms import TURNS, Inboxes, add_rms_norm

ROWS = 600
NUM_TOKENS = (1, 2, 7, 8, 33, 128, 600)
CALLS = 300
GRAPH_CALLS = 5
REPLAYS = 20
EPSILON = 1e-5


class Check:
    """Sums of one size."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        shape = (TURNS, self._num_ranks, ROWS, size)
        own, addresses = share(shape, torch.bfloat16, self._device, dist.group.WORLD)
        self._inboxes = Inboxes.make(own, addresses, self._rank)
        dist.barrier()
        self._same = random.Random(size)  # on all ranks
        self._own = random.Random(size * 64 + self._rank)
        self._generator = torch.Generator(self._device).manual_seed(size)
        self._weight = self._draw(size)
        self._bias = self._draw(size)

    def _draw(self, *shape: int) -> torch.Tensor:
        """Numbers that are the same on all ranks."""
        return torch.randn(shape, generator=self._generator, device=self._device).bfloat16()

    def run_eagerly(self) -> None:
        """Calls of changing sizes and roundings."""
        for _ in range(CALLS):
            num_tokens = self._same.choice(NUM_TOKENS)
            rounding, bias = (
                self._same.choice(list(Rounding)),
                self._same.choice((None, self._bias)),
            )
            parts = self._draw(self._num_ranks, num_tokens, self._size)
            if self._same.random() < 0.1:  # NaN, among them the pair that means "not here yet"
                parts[self._same.randrange(self._num_ranks), 0].view(torch.int16).fill_(-1)
            hidden = self._draw(num_tokens, self._size)
            self._stall()
            found_hidden = hidden.clone()
            found = add_rms_norm(
                found_hidden,
                parts[self._rank],
                self._weight,
                EPSILON,
                rounding,
                bias,
                self._inboxes,
            )
            self._compare(hidden, parts, bias, found_hidden)
            expected = add_rms_norm(found_hidden, None, self._weight, EPSILON, rounding)
            for name in ("plain", "codes", "scales", "sums"):
                a, b = getattr(found, name), getattr(expected, name)
                if a is None:
                    assert b is None
                elif num_tokens % 8 == 0 or name == "plain":  # else the last tile has empty rows
                    assert torch.equal(as_bits(a), as_bits(b)), (num_tokens, name)

    def run_in_graph(self) -> None:
        """An odd number of calls, replayed: turns change from replay to replay."""
        parts = self._draw(GRAPH_CALLS, self._num_ranks, 8, self._size)
        hidden = self._draw(8, self._size)

        def work() -> None:
            for each in parts:
                add_rms_norm(
                    hidden,
                    each[self._rank],
                    self._weight,
                    EPSILON,
                    Rounding.NONE,
                    None,
                    self._inboxes,
                )

        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        for _ in range(REPLAYS):
            parts.copy_(self._draw(*parts.shape))
            start = self._draw(8, self._size)
            hidden.copy_(start)
            self._stall()
            graph.replay()
            for each in parts:
                start += add_up(each)
            assert torch.equal(hidden, start)

    def _stall(self) -> None:
        """Make this rank's card late, now and then."""
        if self._own.random() < 0.3:
            torch.cuda._sleep(self._own.randrange(200_000))

    def _compare(
        self,
        hidden: torch.Tensor,
        parts: torch.Tensor,
        bias: torch.Tensor | None,
        found: torch.Tensor,
    ) -> None:
        added = add_up(parts)
        if bias is not None:
            added = added + bias
        expected = hidden + added
        assert torch.equal(expected.isnan(), found.isnan())
        assert torch.equal(expected.nan_to_num(), found.nan_to_num())


def add_up(parts: torch.Tensor) -> torch.Tensor:
    """The sum in the order of the ranks."""
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    return total.bfloat16()


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """For comparisons in which NaN is NaN."""
    return tensor.contiguous().view(torch.uint8)


def main() -> None:
    """Check sizes that take a part of a thread block, one, and two passes of it."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    for size in (192, 4096, 9216):
        check = Check(size)
        check.run_eagerly()
        check.run_in_graph()
    torch.cuda.synchronize()
    dist.barrier()
    if dist.get_rank() == 0:
        print("all sums are right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

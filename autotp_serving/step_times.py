"""Where a step's time goes on each rank, and how its figures reach rank 0. Every rank.

Totals since the start rather than single steps: a reader takes differences over any stretch of
time, and nothing is lost where it looks seldom. Standard library only.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

LAYOUT = struct.Struct("!QdQQd")


class RankTimes(NamedTuple):
    """Totals of one rank.

    Attributes:
        num_steps: forward passes run.
        step_seconds: time they took. On CUDA and XPU, where work is queued: the time to queue it.
        num_collectives: all-reduces over all ranks inside them.
        collective_bytes: what this rank gave into these all-reduces.
        collective_seconds: time they took, the wait for slower ranks included; with the same
            restriction.
    """

    num_steps: int = 0
    step_seconds: float = 0.0
    num_collectives: int = 0
    collective_bytes: int = 0
    collective_seconds: float = 0.0

    def to_bytes(self) -> bytes:
        """Pack into `LAYOUT.size` bytes."""
        return LAYOUT.pack(*self)

    @staticmethod
    def from_bytes(data: bytes) -> RankTimes:
        """Inverse of `to_bytes`."""
        return RankTimes(*LAYOUT.unpack(data))


class StepTimes:
    """This rank's totals while they grow; used by the thread that runs the steps only."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._step_seconds = 0.0
        self._num_collectives = 0
        self._collective_bytes = 0
        self._collective_seconds = 0.0

    def add_step(self, seconds: float) -> None:
        """Count a forward pass."""
        self._num_steps += 1
        self._step_seconds += seconds

    def add_collective(self, num_bytes: int, seconds: float) -> None:
        """Count an all-reduce over all ranks."""
        self._num_collectives += 1
        self._collective_bytes += num_bytes
        self._collective_seconds += seconds

    def snapshot(self) -> RankTimes:
        """The totals of now."""
        return RankTimes(
            self._num_steps,
            self._step_seconds,
            self._num_collectives,
            self._collective_bytes,
            self._collective_seconds,
        )

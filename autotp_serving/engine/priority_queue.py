"""Who is next where requests have priorities: lower ones first. Rank 0 only."""

from __future__ import annotations

import math
from collections.abc import Iterator

from autotp_serving.engine.sequence import Sequence
from autotp_serving.engine.waiting_queue import WaitingQueue

TURN_LEN = 8
"""Of so many that are taken, one at least is who has waited longest, whatever its priority."""


class PriorityQueue:
    """A `WaitingQueue` for each priority, the lowest number first. See there for the methods.

    Within a priority all is as without. An arrival of a lower number becomes the head at once, but
    for every eighth turn: that is of who has waited longest, so that no flood of others keeps a
    request waiting for ever. Who had such a turn keeps its place: it has no priority any more but
    goes before all others, and so is preempted last and soon runs again.

    Args:
        is_strict: without such turns.
    """

    def __init__(self, *, is_strict: bool = False) -> None:
        self._is_strict = is_strict
        self._queues: dict[float, WaitingQueue] = {}
        self._waiting: dict[Sequence, None] = {}  # in the order in which they came
        self._num_passed = 0  # taken since the first of them was to be

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, priority by priority."""
        for priority in sorted(self._queues):
            yield from self._queues[priority]

    @property
    def head(self) -> Sequence:
        """The next to run; nobody waits: ValueError."""
        if self._is_turn:
            return next(iter(self._waiting))
        return self._queues[min(self._queues)].head

    @property
    def _is_turn(self) -> bool:
        return not self._is_strict and self._num_passed >= TURN_LEN - 1 and bool(self._waiting)

    def append(self, sequence: Sequence) -> None:
        """Queue an arrival behind those of its tenant and priority."""
        self._find(sequence).append(sequence)
        self._waiting[sequence] = None

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence before all others of its priority."""
        self._find(sequence).put_back(sequence)
        self._waiting[sequence] = None

    def adopt(self, sequence: Sequence) -> None:
        """Queue a sequence of another queue."""
        self._find(sequence).adopt(sequence)
        self._waiting[sequence] = None

    def pop(self) -> Sequence:
        """Take the head."""
        if self._is_turn:
            sequence = self.head
            self.remove(sequence)
            sequence.priority = -math.inf
            self._num_passed = 0
            return sequence
        queue = self._queues[min(self._queues)]
        is_first = queue.head is next(iter(self._waiting))
        sequence = queue.pop()
        self._forget(sequence)
        self._num_passed = 0 if is_first else self._num_passed + 1
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is. Raises ValueError when it does not wait."""
        if sequence not in self._waiting:
            raise ValueError(f"{sequence.request_id} does not wait")
        self._queues[sequence.priority].remove(sequence)
        self._forget(sequence)

    def _find(self, sequence: Sequence) -> WaitingQueue:
        return self._queues.setdefault(sequence.priority, WaitingQueue())

    def _forget(self, sequence: Sequence) -> None:
        del self._waiting[sequence]
        if not self._queues[sequence.priority]:
            del self._queues[sequence.priority]

"""The engine's runner in the head: its ranks are other processes, and may end. Head only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

from autotp_serving.batch import (
    Batch,
    DraftInput,
    PoolInput,
    RunnerLost,
    SampleInput,
    ScoreInput,
    StepResult,
)
from autotp_serving.block_transfer import BlockTransfer
from autotp_serving.head.wire import (
    Line,
    LineClosed,
    Ready,
    SampleWriter,
    pack_pools,
    pack_scores,
    unpack_result,
)
from autotp_serving.request import AdapterError
from autotp_serving.step_times import RankTimes


class RemoteRunner:
    """Hands each step to rank 0 in one write, and waits for what it reports. See `Runner`.

    Each group of ranks is an epoch. A report carries the epoch and the number of its step, and one
    that is not of the step that is waited for is dropped.

    Attributes:
        num_collected: steps of this group that have ended.
    """

    def __init__(self) -> None:
        self.num_blocks = self.block_size = self.max_in_flight = 0
        self.has_states = False
        self.can_draft = True
        self.stored_blocks: Sequence[tuple[int, bytes]] = ()
        self.rank_times: list[RankTimes] = []
        self.num_collected = 0
        self._line: Line | None = None
        self._epoch = 0
        self._num_begun = 0
        self._writer = SampleWriter()
        self._forwarded: Batch | None = None
        self._in_flight: deque[int] = deque()

    def attach(self, line: Line, ready: Ready, epoch: int) -> None:
        """Go on with a new group of ranks, which knows of nothing."""
        self.num_blocks, self.block_size = ready.num_blocks, ready.block_size
        self.max_in_flight = ready.max_in_flight
        self.has_states = ready.has_states
        self.can_draft = ready.can_draft
        self.stored_blocks = ready.stored_blocks
        self.num_collected = 0
        self._line = line
        self._epoch = epoch
        self._writer = SampleWriter()
        self._forwarded = None
        self._in_flight.clear()

    def forward(self, batch: Batch) -> None:
        """See Runner; it is sent along with the samples."""
        self._forwarded = batch

    def sample(
        self,
        samples: Sequence[SampleInput],
        scores: Sequence[ScoreInput] = (),
        pools: Sequence[PoolInput] = (),
    ) -> None:
        """See Runner.

        Raises:
            RunnerLost: the ranks are gone.
        """
        assert self._forwarded is not None, "nothing was forwarded"
        self._num_begun += 1
        self._in_flight.append(self._num_begun)
        packed = self._writer.pack(samples)
        self._send(
            *("step", self._epoch, self._num_begun, self._forwarded.to_bytes(), packed),
            *(pack_scores(scores), pack_pools(pools), self._writer.take_released()),
        )
        self._forwarded = None

    def collect(self) -> StepResult:
        """See Runner.

        Raises:
            RunnerLost: the ranks are gone.
        """
        if len(self._in_flight) < self.max_in_flight:
            self._send("collect")  # they would wait for as many as there may be
        expected = self._epoch, self._in_flight.popleft()
        while True:
            epoch, number, times, result = self._receive()
            if (epoch, number) == expected:
                break
        self.rank_times = [RankTimes(*one) for one in times]
        self.num_collected += 1
        return unpack_result(result)

    def transfer(self, transfer: BlockTransfer) -> list[int]:
        """See Runner. No report of a step is on its way meanwhile: one more may begin.

        Raises:
            RunnerLost: the ranks are gone.
        """
        self._send("transfer", transfer.to_bytes())
        failed: list[int] = self._receive()[1]
        return failed

    def draft(self, batch: Batch, drafts: Sequence[DraftInput]) -> list[list[int]]:
        """See Runner.

        Raises:
            RunnerLost: the ranks are gone.
        """
        self._send("draft", batch.to_bytes(), [astuple(one) for one in drafts])
        found: list[list[int]] = self._receive()
        return found

    def load_adapter(self, slot: int, path: str) -> None:
        """See Runner.

        Raises:
            RunnerLost: the ranks are gone.
        """
        self._send("load adapter", slot, path)
        error = self._receive()
        if error is not None:
            raise AdapterError(error)

    def drop_adapter(self, slot: int) -> None:
        """See Runner."""
        self._send("drop adapter", slot)

    def release(self, request_id: str) -> None:
        """See Runner."""
        self._writer.release(request_id)

    def _receive(self) -> Any:
        assert self._line is not None
        try:
            return self._line.receive()
        except LineClosed as error:
            raise RunnerLost("the ranks are gone") from error

    def _send(self, *message: Any) -> None:
        assert self._line is not None
        try:
            self._line.send(message)
        except LineClosed as error:
            raise RunnerLost("the ranks are gone") from error

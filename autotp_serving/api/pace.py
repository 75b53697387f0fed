"""When will there be room: from the tokens that are left and the measured pace. Rank 0 only.

Used on the event loop, which hears of every step that gave tokens.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from autotp_serving.request import Request, RequestOutput

NUM_INTERVALS = 64
"""Steps over which the pace is measured."""

NUM_ENDS = 64
"""Answers that tell how much of what may be asked for is used."""


class Pace:
    """Follows the open requests, and foretells when some of them will have ended."""

    def __init__(self) -> None:
        self._max_tokens: dict[str, int] = {}  # of each open request, in order of arrival
        self._num_done: dict[str, int] = {}  # of those that have begun to answer
        self._intervals: deque[float] = deque(maxlen=NUM_INTERVALS)
        self._ends: deque[tuple[int, int]] = deque(maxlen=NUM_ENDS)  # tokens used, tokens allowed
        self._last_time = 0.0
        self._num_running = 0  # in the latest step
        self._is_first = True
        self._first_interval: float | None = None

    def open(self, requests: Sequence[Request], now: float) -> None:
        """These requests begin to wait."""
        if not self._max_tokens:
            self._last_time = now  # idle time is not the engine's
            self._is_first = True
        for request in requests:
            self._max_tokens[request.request_id] = max(1, request.params.max_tokens)

    def add(self, outputs: Sequence[RequestOutput], now: float) -> None:
        """A step has given these outputs."""
        num_tokens = num_running = 0
        for output in outputs:
            if output.request_id in self._max_tokens:
                num_done = self._num_done.get(output.request_id, 0) + len(output.token_ids)
                self._num_done[output.request_id] = num_done
                num_tokens += len(output.token_ids)
                num_running += 1
                if output.finish_reason in ("stop", "length"):
                    self._ends.append((num_done, self._max_tokens[output.request_id]))
        if num_tokens:
            if self._is_first:  # the prompts' step: it says little of those that follow
                self._first_interval = now - self._last_time
                self._is_first = False
            else:
                self._intervals.append(now - self._last_time)
            self._last_time = now
            self._num_running = num_running

    def close(self, request_id: str) -> None:
        """A request has ended, or its client has left."""
        self._max_tokens.pop(request_id, None)
        self._num_done.pop(request_id, None)

    def seconds_until(self, num_finishes: int, now: float) -> float:
        """Seconds until so many of the open requests will have ended.

        Before anything is measured: as long again as the first step has taken so far.
        """
        since = now - self._last_time
        intervals = list(self._intervals)
        if not intervals and self._first_interval is not None:
            intervals = [self._first_interval]
        if not intervals:
            return since
        mean = sum(intervals) / len(intervals)
        if since > mean:  # the present step is slower, or never ends
            mean = (sum(intervals) + since) / (len(intervals) + 1)
        return mean * self._steps_until(num_finishes)

    def _steps_until(self, num_finishes: int) -> float:
        """Steps, each a token for everyone who runs; who waits takes the place of who ends."""
        used = sum(used for used, _ in self._ends)
        share = used / sum(allowed for _, allowed in self._ends) if self._ends else 1.0
        running = [
            self._steps_left(self._max_tokens[name], num_done, share)
            for name, num_done in self._num_done.items()
        ]
        waiting = self._waiting(share)
        # In the places of those who have just ended, others begin.
        running += islice(waiting, max(0, max(1, self._num_running) - len(running)))
        heapq.heapify(running)
        steps = 0.0
        for _ in range(num_finishes):
            if not running:
                break
            steps = heapq.heappop(running)
            length = next(waiting, None)
            if length is not None:
                heapq.heappush(running, steps + length)
        return steps

    def _waiting(self, share: float) -> Iterator[float]:
        for name, max_tokens in self._max_tokens.items():
            if name not in self._num_done:
                yield self._steps_left(max_tokens, 0, share)

    @staticmethod
    def _steps_left(max_tokens: int, num_done: int, share: float) -> float:
        """Answers use the same share of what they may; one that has passed it, of the rest."""
        left = share * max_tokens - num_done
        return max(1.0, left if left > 0 else share * (max_tokens - num_done))

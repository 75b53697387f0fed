"""Notices a step that does not end, from a thread of its own. Rank 0 only.

A rank that has died or is stopped shows on its connection (`distributed/peer_monitor.py`). One that
hangs in the middle of a step, in a driver or waiting for another, shows by the step alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FIRST_STEPS = 3
FIRST_SECONDS = 600.0
"""The first steps may compile and touch all of memory: they get so long, and teach nothing."""

SLACK = 10.0
"""A step may take so many times what steps of its size took before, where that is more."""

DECAY = 0.99
"""By which a size's slowest step is forgotten, with each further step of that size."""

OVERSLEPT_SECONDS = 1.0
"""A thread woken so much too late did not run meanwhile, nor did the step: it gets that time."""


class StepLimits:
    """How long a step may take, from how long others took.

    Args:
        step_timeout: seconds that every step may take.
    """

    def __init__(self, step_timeout: float) -> None:
        self._step_timeout = step_timeout
        self._num_steps = 0
        self._slowest: dict[int, float] = {}  # seconds, by the number of tokens' bit length

    def find(self, num_tokens: int) -> float:
        """Seconds for a step of so many tokens.

        Its size may be new. Then more tokens are taken to cost no more each than fewer did.
        """
        if self._num_steps < FIRST_STEPS:
            return max(self._step_timeout, FIRST_SECONDS)
        size = num_tokens.bit_length()
        if size not in self._slowest:
            larger = [known for known in self._slowest if known > size]
            size = min(larger) if larger else max(self._slowest, default=size)
        times_larger = 2.0 ** max(0, num_tokens.bit_length() - size)
        expected = self._slowest.get(size, 0.0) * times_larger
        return max(self._step_timeout, SLACK * expected)

    def learn(self, num_tokens: int, seconds: float) -> None:
        """Take note of a step that has ended."""
        self._num_steps += 1
        if self._num_steps > FIRST_STEPS:
            size = num_tokens.bit_length()
            self._slowest[size] = max(seconds, DECAY * self._slowest.get(size, 0.0))


class StepWatchdog:
    """Calls `on_stall` once, in its own thread, when a step has taken longer than it may.

    `begin` and `end` cost a step next to nothing: the thread sleeps through many, and looks once
    in the least time that a step has.

    Args:
        step_timeout: see StepLimits.
        on_stall: is given the seconds that the step had.
    """

    def __init__(self, step_timeout: float, on_stall: Callable[[float], None]) -> None:
        self._step_timeout = step_timeout
        self._limits = StepLimits(step_timeout)
        self._on_stall = on_stall
        self._step: tuple[float, float, int] | None = None  # begin, limit, number of tokens
        self._is_idle = False
        self._is_stopped = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="step-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer. May be called twice, and without a start."""
        self._is_stopped = True
        self._wake.set()

    @property
    def is_watching(self) -> bool:
        """Whether a step is under way."""
        return self._step is not None

    def begin(self, num_tokens: int) -> None:
        """A step begins."""
        self._step = (time.monotonic(), self._limits.find(num_tokens), num_tokens)
        if self._is_idle:
            self._wake.set()

    def end(self, *, is_step: bool = True) -> None:
        """It has ended; what is not like a step tells nothing of how long others may take."""
        assert self._step is not None
        started, _, num_tokens = self._step
        self._step = None
        if is_step:
            self._limits.learn(num_tokens, time.monotonic() - started)

    def _run(self) -> None:
        extra, extra_of = 0.0, None
        while not self._is_stopped:
            step = self._step
            if step is None:
                self._is_idle = True
                if self._step is None:  # a `begin` from here on finds the flag set
                    self._wake.wait()
                self._is_idle = False
                self._wake.clear()
                continue
            if step is not extra_of:
                extra, extra_of = 0.0, step
            started, limit, _ = step
            left = started + limit + extra - time.monotonic()
            if left > 0:
                before = time.monotonic()
                # A step that begins meanwhile may have less time than what this one has left.
                left = min(left, self._step_timeout)
                self._wake.wait(left)
                self._wake.clear()
                overslept = time.monotonic() - before - left
                if overslept > OVERSLEPT_SECONDS:
                    extra += overslept
            elif self._step is step:
                self._on_stall(limit)
                return

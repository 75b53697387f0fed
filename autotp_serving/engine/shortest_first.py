"""Threads that take the smallest piece of work first, so that small ones pass large ones. Rank 0.

They are daemons: work that is still under way when the process ends holds nobody up.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import PriorityQueue
from typing import Any


class ShortestFirst:
    """Runs functions in a few threads of its own, by size, and by age where sizes are equal.

    Args:
        num_threads: functions that run at once; their threads start with the first function.
        name: of the threads.
        niceness: how far the threads stand back for others, 0 to 19.
        stack_bytes: of each thread; 0 is the system's default.
    """

    def __init__(
        self, num_threads: int, name: str, *, niceness: int = 0, stack_bytes: int = 0
    ) -> None:
        self._num_threads = num_threads
        self._name = name
        self._niceness = niceness
        self._stack_bytes = stack_bytes
        self._is_started = False
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._queue: PriorityQueue[tuple[int, int, Callable[[], Any], Future[Any]]] = (
            PriorityQueue()
        )

    def submit(self, size: int, work: Callable[[], Any]) -> Future[Any]:
        """Queue a function; the future has its result or what it raised. Safe in any thread."""
        with self._lock:
            if not self._is_started:
                self._is_started = True
                self._start()
        future: Future[Any] = Future()
        self._queue.put((size, next(self._numbers), work, future))
        return future

    def _start(self) -> None:
        before = threading.stack_size(self._stack_bytes)  # of all threads that start now
        try:
            for number in range(self._num_threads):
                name = f"{self._name}_{number}"
                threading.Thread(target=self._run, name=name, daemon=True).start()
        finally:
            threading.stack_size(before)

    def _run(self) -> None:
        if self._niceness:  # on Linux a thread has a niceness of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        while True:
            _, _, work, future = self._queue.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:  # a panic in a Rust library derives from it directly
                future.set_exception(error)
            else:
                future.set_result(result)
                del result  # or it would live until the next one
            del work, future

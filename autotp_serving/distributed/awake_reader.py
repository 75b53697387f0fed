"""Waits for what comes next on a connection: awake at first, then asleep. Every rank.

The next step usually comes within milliseconds, and to be woken takes part of one, most where the
core has gone to sleep too. So the wait begins awake, unless others want the core; then the process
sleeps in the kernel for as long as the server is idle.
"""

from __future__ import annotations

import os
import socket
import time

SPIN_SECONDS = 0.01
LONG_YIELD_SECONDS = 0.001
MAX_LONG_WAITS = 3
REST_SECONDS = 0.5
"""So many waits in a row with a long yield: each has given a whole slice of the core away, to a
process of lowest priority as to any other. Who sleeps gets the core back at once, so that is how
waits begin for a while."""


class AwakeReader:
    """Reads from a connection that blocks; used by one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._num_long_waits = 0
        self.rests_until = 0.0

    def read(self, num_bytes: int) -> bytes:
        """Wait for the next bytes, at most so many; none at the connection's end.

        Raises:
            OSError: the connection has failed.
        """
        is_long = False
        now = time.monotonic()
        deadline = now + SPIN_SECONDS
        data = None
        while data is None and self.rests_until <= now < deadline:
            try:
                data = self._connection.recv(num_bytes, socket.MSG_DONTWAIT)
            except BlockingIOError:
                os.sched_yield()
                before, now = now, time.monotonic()
                is_long = is_long or now - before > LONG_YIELD_SECONDS
        self._num_long_waits = self._num_long_waits + 1 if is_long else 0
        if self._num_long_waits == MAX_LONG_WAITS:
            self.rests_until = now + REST_SECONDS
        return self._connection.recv(num_bytes) if data is None else data

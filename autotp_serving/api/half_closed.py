"""Clients that close their own half of a connection and still read the other. Rank 0 only.

A client that has left altogether sends the same as one that has only finished sending. Its kernel
answers the next piece of data by a reset, so in a while it is sent one that means nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

HALF_CLOSED_SECONDS = 0.25
"""A client that has closed its half gets an answer that is ready by then; later ones it has to be
there for."""

FIRST_LOOK_SECONDS = 0.05
LONGEST_LOOK_SECONDS = 5.0
TCP_CLOSED = 7

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LEADING_ZERO = b"0"
"""Of the next chunk's length."""


class HalfClosedWatch:
    """Ends a connection once nobody is there to read its answer.

    Args:
        connection: that reads no more, and so is not told itself.
        is_closing: whether no more than the rest of an answer goes out.
        find_running: the request that is being answered.
    """

    def __init__(
        self,
        connection: asyncio.Transport,
        is_closing: Callable[[], bool],
        find_running: Callable[[], RequestResponseCycle | None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._is_closing = is_closing
        self._find_running = find_running
        self._timer = self._loop.call_later(HALF_CLOSED_SECONDS, self._probe)

    def cancel(self) -> None:
        """Watch no longer."""
        self._timer.cancel()

    def _probe(self) -> None:
        cycle = self._find_running()
        if cycle is None or cycle.response_complete or self._is_closing():
            return
        if cycle.response_started:
            if cycle.chunked_encoding:
                self._connection.write(LEADING_ZERO)
        elif cycle.scope["http_version"] == "1.1":
            self._connection.write(CONTINUE)
        self._look_again(FIRST_LOOK_SECONDS)

    def _look(self, seconds: float) -> None:
        sock = self._connection.get_extra_info("socket")
        with contextlib.suppress(OSError):
            if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_CLOSED:
                self._look_again(min(2 * seconds, LONGEST_LOOK_SECONDS))
                return
        self._connection.abort()

    def _look_again(self, seconds: float) -> None:
        self._timer = self._loop.call_later(seconds, self._look, seconds)

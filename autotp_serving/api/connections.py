"""Takes connections in, as many as there are file descriptors for. Rank 0 only.

A client that holds a connection without a request on it is the first to go: after a while, and at
once where all places are taken and somebody else arrives. Where every place has a request on it, a
few more connections are taken in for probes, and for refusals in words.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import ssl
from collections.abc import Callable
from functools import partial

from autotp_serving.api.errors import render_refusal

logger = logging.getLogger("uvicorn.error")

WAIT_SECONDS = 20.0
"""How long a connection may be without a whole head of a request, TLS included."""

NUM_SPARE = 8
"""Connections beyond the limit that are still asked what they want."""

NUM_OTHER_FILES = 24
"""Descriptors left for files, children and connections that are just being closed."""

MAX_FILES = 2**16
"""What the process asks for, if the machine's hard limit allows it."""

MAX_AT_ONCE = 8
"""Connections taken in before others get a turn on the event loop."""

BACKLOG = 2048
PAUSE_SECONDS = 0.2
QUIET_SECONDS = 10.0
FULL = "all connections that this server can hold are in use"


def find_max_connections() -> int:
    """Connections that the process has file descriptors for, beside what it has open already."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    limit = MAX_FILES if soft == resource.RLIM_INFINITY else soft
    num_open = len(os.listdir("/proc/self/fd"))
    return max(1, limit - num_open - NUM_OTHER_FILES - NUM_SPARE)


def _do_nothing() -> None:
    """What a place without a connection does."""


class Place:
    """One connection's place among all.

    Attributes:
        is_spare: it is one of those beyond the limit.
        give_way: ends the connection, since another needs the place.
        expire: ends it, since it has waited for too long.
    """

    give_way: Callable[[], object]
    expire: Callable[[], object]

    def __init__(self, places: Places, *, is_spare: bool) -> None:
        self.is_spare = is_spare
        self.give_way = self.expire = _do_nothing
        self._places = places

    def wait(self) -> None:
        """A request of this connection is being waited for, from now on."""
        if self in self._places.taken:
            self._places.waiting[self] = self._places.now()

    def work(self) -> None:
        """One has come."""
        self._places.waiting.pop(self, None)

    def leave(self) -> None:
        """The connection has ended. May be called twice."""
        self.work()
        self._places.taken.discard(self)
        self.give_way = self.expire = _do_nothing


class Places:
    """All places, and in the order of their patience those that wait for a request."""

    def __init__(self, max_places: int, now: Callable[[], float], num_spare: int = NUM_SPARE):
        self.taken: set[Place] = set()
        self.waiting: dict[Place, float] = {}
        self.now = now
        self._max_places = max_places
        self._num_spare = num_spare
        self._quiet_until = 0.0

    def take(self) -> Place | None:
        """A place for a connection that has just arrived; None where none is to be had."""
        is_spare = len(self.taken) >= self._max_places
        if is_spare:
            self._tell()
            longest = next(iter(self.waiting), None)
            if longest is not None:
                is_spare = longest.is_spare
                give_way = longest.give_way
                longest.leave()
                give_way()
            elif len(self.taken) >= self._max_places + self._num_spare:
                return None
        place = Place(self, is_spare=is_spare)
        self.taken.add(place)
        place.wait()
        return place

    def expire(self) -> None:
        """End whatever has waited for too long."""
        latest = self.now() - WAIT_SECONDS
        while self.waiting:
            place, since = next(iter(self.waiting.items()))
            if since > latest:
                return
            place.work()
            place.expire()

    def _tell(self) -> None:
        if self.now() >= self._quiet_until:
            self._quiet_until = self.now() + QUIET_SECONDS
            logger.warning(
                "%d connections are open, all that there are file descriptors for: those without "
                "a request make room, and others are refused (raise `ulimit -n`)",
                len(self.taken),
            )


def _hang_up(connection: socket.socket) -> None:
    """End a connection that may belong to the event loop already, which will find it ended."""
    with contextlib.suppress(OSError):  # the other side was first
        connection.shutdown(socket.SHUT_RDWR)


class Acceptor:
    """Takes connections in from a listening socket; to uvicorn it is an asyncio server.

    Args:
        make_protocol: for the connection at a place.
    """

    def __init__(
        self,
        sock: socket.socket,
        places: Places,
        make_protocol: Callable[[Place], asyncio.Protocol],
        context: ssl.SSLContext | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._places = places
        self._make_protocol = make_protocol
        self._context = context
        self._tasks: dict[asyncio.Task[None], socket.socket] = {}
        self._pause: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._resume()

    def close(self) -> None:
        """Take nobody in any more; the socket is closed by its owner."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock.fileno())
        for connection in self._tasks.values():
            _hang_up(connection)

    async def wait_closed(self) -> None:
        """Wait for connections that were just being taken in."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(MAX_AT_ONCE):
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # the machine is out of files or memory
                logger.warning("No connection can be taken in for now: %s", error.strerror)
                self._loop.remove_reader(self._sock.fileno())
                self._pause = self._loop.call_later(PAUSE_SECONDS, self._resume)
                return
            connection.setblocking(False)
            place = self._places.take()
            if place is None:
                self._refuse(connection)
                connection.close()
                continue
            place.give_way = partial(self._turn_back, connection)
            place.expire = partial(_hang_up, connection)
            task = self._loop.create_task(self._hand_over(connection, place))
            self._tasks[task] = connection
            task.add_done_callback(self._tasks.pop)

    async def _hand_over(self, connection: socket.socket, place: Place) -> None:
        """Make a connection the protocol's, after TLS has been agreed on, if it is wanted."""
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._make_protocol(place), connection, ssl=self._context
            )
        except OSError:  # it left, spoke no TLS, or took too long
            place.leave()
            connection.close()

    def _turn_back(self, connection: socket.socket) -> None:
        """Have a connection give way that no protocol has yet, or only just."""
        self._refuse(connection)
        _hang_up(connection)

    def _refuse(self, connection: socket.socket) -> None:
        """Answer 503 to whatever it may have asked; over TLS that would take a handshake."""
        if self._context is None:
            with contextlib.suppress(OSError):  # it has left, or reads nothing
                connection.send(render_refusal(503, FULL, code="too_many_connections"))
                # What has come is read, or the kernel would take the answer back.
                connection.recv(2**16)

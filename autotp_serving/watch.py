"""Notice that another rank is gone, also from inside a sum that never ends. Every rank.

A thread sleeps in the kernel until a connection of the plan channel ends. A process that dies
closes its own; that a host has fallen silent (link cut, power lost) the kernel finds by probing it.
No message of ours is needed for that: an idle server stays idle, and a rank that is busy for a
while is not taken for dead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Mapping

SILENCE_SECONDS = 15
"""A host that acknowledges nothing for so long is lost."""
PROBE_SECONDS = 5

UNREACHABLE = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN}


def probe_peer(connection: socket.socket) -> None:
    """Have the kernel end a connection whose other host has fallen silent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": PROBE_SECONDS,
        "TCP_KEEPINTVL": PROBE_SECONDS,
        "TCP_KEEPCNT": SILENCE_SECONDS // PROBE_SECONDS - 1,
        "TCP_USER_TIMEOUT": SILENCE_SECONDS * 1000,  # for data that waits to be acknowledged
    }
    for name, value in options.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def describe_loss(name: str, code: int | None) -> str:
    """One sentence on a rank whose connection has ended.

    Args:
        code: the connection's errno; none if the peer closed it.
    """
    if code in UNREACHABLE:
        return f"{name} is lost: its host has not answered for {SILENCE_SECONDS} s"
    return f"{name} has died"


class PeerWatch:
    """Calls `on_loss` once, in its own thread, when the first of the connections ends.

    Args:
        connections: by the name of the rank at their other end.
        on_loss: is given a sentence that names it.
        patience: seconds in which a `stop` still prevents the call, for those who may find a
            message to stop before the end of the connection.
    """

    def __init__(
        self,
        connections: Mapping[str, socket.socket],
        on_loss: Callable[[str], None],
        patience: float = 0.0,
    ) -> None:
        self._connections = {item.fileno(): (name, item) for name, item in connections.items()}
        self._on_loss = on_loss
        self._patience = patience
        self._stopped = threading.Event()
        self._wake_reader, self._wake_writer = os.pipe()
        threading.Thread(target=self._run, name="peer-watch", daemon=True).start()

    def stop(self) -> None:
        """From now on connections may end. May be called twice."""
        if not self._stopped.is_set():
            self._stopped.set()
            os.close(self._wake_writer)

    def _run(self) -> None:
        ends = select.poll()
        ends.register(self._wake_reader)
        for number in self._connections:
            ends.register(number, select.POLLRDHUP)  # errors are told unasked
        number = ends.poll()[0][0]
        if not self._stopped.wait(self._patience):
            name, connection = self._connections[number]
            code = None
            with contextlib.suppress(OSError):  # closed by this process meanwhile
                code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._on_loss(describe_loss(name, code))
        os.close(self._wake_reader)

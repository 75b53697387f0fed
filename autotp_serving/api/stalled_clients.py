"""Clients that take nothing of their answers are not waited for once the server stops. Rank 0 only.

While it serves, `streaming_response.py` has more patience with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import struct
import sys
import time
from collections.abc import Iterable
from typing import Any

logger = logging.getLogger("uvicorn.error")

LOOK_SECONDS = 0.5
STALL_SECONDS = 4.0
"""A client that takes nothing for so long, with something there to take, is let go."""


def count_unsent(transport: asyncio.Transport) -> int:
    """Bytes that the peer has not acknowledged, the kernel's own buffer included."""
    num_bytes = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if sock is not None and sys.platform == "linux":
        import termios

        with contextlib.suppress(OSError):  # just closed
            answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
            num_bytes += struct.unpack("i", answer)[0]
    return num_bytes


async def cut_stalled(connections: Iterable[Any]) -> None:
    """Close the connections of those who do not read, until cancelled.

    Args:
        connections: uvicorn's protocols, a set that changes meanwhile.
    """
    progress: dict[Any, tuple[int, float]] = {}  # the least left to take, and since when
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        now = time.monotonic()
        paused = [one for one in connections if one.flow.write_paused]
        progress = {one: progress[one] for one in paused if one in progress}
        for connection in paused:
            num_left = count_unsent(connection.transport)
            least, since = progress.get(connection, (num_left + 1, now))
            if num_left < least:
                progress[connection] = (num_left, now)
            elif now - since >= STALL_SECONDS:
                logger.info("Closing a connection whose client reads nothing")
                connection.transport.abort()


def cut_all(connections: Iterable[Any]) -> None:
    """Close all connections, whatever is still on its way."""
    for connection in list(connections):
        connection.transport.abort()

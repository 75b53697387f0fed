"""A request's body, read within limits of size and time. Rank 0 only."""

from __future__ import annotations

import asyncio
import sys

from starlette.types import Receive, Scope

from autotp_serving.api.errors import ApiError
from autotp_serving.api.large_bodies import MIN_LARGE_BYTES, LargeBodies
from autotp_serving.engine.sandbox import Spool

BODY_SECONDS = 30.0
BODY_BYTES_PER_SECOND = 16 * 2**10
"""A body may take so many seconds, and one more for each so many bytes that have come of it."""


class ClientLeftError(Exception):
    """The client closed the connection while it was still sending."""


def find_encoding(scope: Scope) -> str | None:
    """How a body is packed, where it is not plain."""
    for name, value in scope["headers"]:
        if name == b"content-encoding" or name == b"transfer-encoding":
            encodings: list[str] = value.decode("latin-1").lower().split(",")
            for encoding in map(str.strip, encodings):
                if encoding not in ("", "identity", "chunked"):
                    return encoding
    return None


async def read_body(scope: Scope, receive: Receive, limit: int, large_bodies: LargeBodies) -> bytes:
    """Read the whole request body.

    Args:
        limit: bytes that it may have (--max-body-size).
        large_bodies: looks through one that is large before it is in this process's memory.

    Raises:
        ApiError: 413 before more than `limit` bytes are held; 408 when its time is over; what is
            wrong with a large one.
        ClientLeftError: the client did not send all of it.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit:
            raise _too_large(limit)
    chunks = []
    size = 0
    file: Spool | None = None
    with _BodyTimer() as timer:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            chunks.append(chunk)
            if size > MIN_LARGE_BYTES:
                file = _spool(file, chunks)
            if not message.get("more_body", False):
                break
            timer.num_bytes = size
    if file is None:
        return b"".join(chunks)
    await large_bodies.check(file, scope["path"])
    return file.read()


def _spool(file: Spool | None, chunks: list[bytes]) -> Spool:
    """Move what has come into the file, which is made for the first of it."""
    try:
        file = file or Spool()
        file.write(b"".join(chunks))
    except OSError as error:
        raise ApiError(
            503,
            f"there is no room for a body of this size ({error.strerror}): try again",
            code="busy",
            headers={"Connection": "close", "Retry-After": "1"},
        ) from error
    chunks.clear()
    return file


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes (--max-body-size)",
        headers={"Connection": "close"},
    )


class _BodyTimer:
    """Interrupts the task it is made in, by an ApiError, once a body takes too long.

    Attributes:
        num_bytes: that have come of it.
    """

    def __enter__(self) -> _BodyTimer:
        self.num_bytes = 0
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._start = self._loop.time()
        self._is_late = False
        self._timer = self._loop.call_later(BODY_SECONDS, self._check)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._is_late and kind is asyncio.CancelledError:
            if sys.version_info >= (3, 11):  # else whoever looks finds the task cancelled
                self._task.uncancel()
            raise ApiError(
                408,
                f"the body came too slowly: it may take {BODY_SECONDS:g} s, and a second more for "
                f"each {BODY_BYTES_PER_SECOND} bytes",
                headers={"Connection": "close"},
            )

    def _check(self) -> None:
        end = self._start + BODY_SECONDS + self.num_bytes / BODY_BYTES_PER_SECOND
        if self._loop.time() < end:
            self._timer = self._loop.call_at(end, self._check)
        else:
            self._is_late = True
            self._task.cancel()

"""The bridge between the engine thread and the event loop. Rank 0 only.

One way in: `AsyncEngine.open` submits requests. One way back: the engine thread calls `deliver`
once per step, which makes one hop to the event loop for all outputs of that step.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autotp_serving.api.errors import ApiError
from autotp_serving.api.metrics import Latencies, Progress
from autotp_serving.engine import EngineError, QueueFullError
from autotp_serving.request import Request, RequestOutput

if TYPE_CHECKING:
    from autotp_serving.engine import Engine

logger = logging.getLogger(__name__)

OutputSink = Callable[[list[RequestOutput]], None]

MAX_RETRY_AFTER = 600


@dataclass
class Usage:
    """Tokens that one HTTP request has cost so far."""

    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0


class TokenStream:
    """Outputs of the requests of one client, as they come: `async for outputs in stream`.

    Each turn yields everything that arrived since the last one, so a slow client gets few large
    pieces rather than a growing backlog. It ends after the last request's last output.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, requests: Sequence[Request], usage: Usage
    ) -> None:
        self.unfinished = {request.request_id for request in requests}
        self._usage = usage
        self._loop = loop
        self._pending: list[RequestOutput] = []
        self._waiter: asyncio.Future[None] | None = None

    def push(self, output: RequestOutput) -> None:
        """Add an output; called on the event loop."""
        self._usage.num_output_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self.unfinished.discard(output.request_id)
            self._usage.num_cached_tokens += output.num_cached_tokens
        self._pending.append(output)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> list[RequestOutput]:
        while not self._pending:
            if not self.unfinished:
                raise StopAsyncIteration
            self._waiter = self._loop.create_future()
            await self._waiter
        outputs, self._pending = self._pending, []
        return outputs


class AsyncEngine:
    """The engine as request handlers see it.

    `make_engine` receives the function to which the engine must hand its outputs; that breaks the
    circle between the two objects.
    """

    def __init__(self, make_engine: Callable[[OutputSink], Engine]) -> None:
        self.engine = make_engine(self.deliver)
        self.is_draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.latencies = Latencies()
        self._streams: dict[str, tuple[TokenStream, Progress]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._busy_since = 0.0
        self._finish_times: deque[float] = deque(maxlen=64)

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the event loop that serves requests; before the first `open`."""
        self._loop = loop

    @property
    def num_open(self) -> int:
        """Requests submitted and not yet finished."""
        return len(self._streams)

    @contextmanager
    def open(self, requests: Sequence[Request], usage: Usage) -> Iterator[TokenStream]:
        """Submit requests and stream their outputs; leaving the block early aborts them.

        What they generate is added to `usage` as it comes.

        The one release path: finished, failed, cancelled or left by its client, a request is
        forgotten here and, where it still runs, aborted in the engine.

        Raises:
            ApiError: 503 when the engine has failed, is stopping, or its queue is full.
        """
        self._check_open()
        assert self._loop is not None, "bind() comes first"
        stream = TokenStream(self._loop, requests, usage)
        if self._idle.is_set():
            self._idle.clear()
            self._busy_since = time.monotonic()
        for request in requests:
            self._streams[request.request_id] = stream, Progress(request.arrival_time)
        try:
            for request in requests:
                self.engine.submit(request)
            yield stream
        except QueueFullError as error:
            wait = self.seconds_until_room()
            raise ApiError(
                503, str(error), code="queue_full", headers={"Retry-After": str(wait)}
            ) from error
        except EngineError as error:
            raise ApiError(503, str(error), code="engine_failed") from error
        finally:
            for request_id in stream.unfinished:
                self._forget(request_id)
                self.engine.abort(request_id)

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Take the outputs of one step; called on the engine thread."""
        try:
            self._loop.call_soon_threadsafe(self._dispatch, outputs)
        except RuntimeError:  # the loop has closed: the server has stopped, no one reads
            logger.debug("outputs of %d requests came too late", len(outputs))

    def seconds_until_room(self) -> int:
        """Seconds until a place in the queue should be free: the mean time between finishes.

        Measured over the latest finishes since the engine was last idle, and up to now, so that
        an engine that stalls is told truly as well.
        """
        start = self._finish_times[0] if self._finish_times else self._busy_since
        mean = (time.monotonic() - start) / max(1, len(self._finish_times))
        return max(1, min(MAX_RETRY_AFTER, math.ceil(mean)))

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, let the running ones finish, end the rest when time is over."""
        self.is_draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except asyncio.TimeoutError:
            self.end_all("the server is shutting down")

    def end_all(self, message: str) -> None:
        """End every open request with an error."""
        for request_id, (stream, _) in list(self._streams.items()):
            self._forget(request_id)
            self.engine.abort(request_id)
            stream.push(RequestOutput(request_id, text="", finish_reason="error", error=message))

    def _check_open(self) -> None:
        if self.engine.failure is not None:
            raise ApiError(503, self.engine.failure, code="engine_failed")
        if self.is_draining:
            raise ApiError(
                503, "the server is shutting down", code="draining", headers={"Retry-After": "30"}
            )

    def _dispatch(self, outputs: list[RequestOutput]) -> None:
        now = time.monotonic()
        for output in outputs:
            if output.request_id not in self._streams:
                continue  # its client has left; the engine has not heard of it yet
            stream, progress = self._streams[output.request_id]
            self.latencies.observe(progress, output, now)
            if output.finish_reason is not None:
                self._finish_times.append(now)
                self._forget(output.request_id)
            stream.push(output)

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        if not self._streams:
            self._idle.set()
            self._finish_times.clear()

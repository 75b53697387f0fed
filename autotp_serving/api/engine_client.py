"""The bridge between the engine thread and the event loop. Rank 0 only.

One way in: `EngineClient.open` submits requests. One way back: the engine thread calls `deliver`
once per step, which makes one hop to the event loop for all outputs of that step.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autotp_serving.api.errors import ApiError
from autotp_serving.api.metrics import Latencies, Progress
from autotp_serving.api.pace import Pace
from autotp_serving.engine import (
    Engine,
    EngineError,
    EngineGroups,
    QueueFullError,
    ShareFullError,
)
from autotp_serving.request import Request, RequestOutput

if TYPE_CHECKING:
    from autotp_serving.api.traces import Traces

logger = logging.getLogger(__name__)

OutputSink = Callable[[list[RequestOutput]], None]

MAX_RETRY_AFTER = 600


@dataclass
class Usage:
    """Tokens that one HTTP request has cost so far, each prompt counted once."""

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
        # Completions after a prompt's first find it in the cache because that one has run.
        firsts = {id(request.prompt_token_ids): request for request in reversed(requests)}
        self._first_ids = {request.request_id for request in firsts.values()}
        self._usage = usage
        self._loop = loop
        self._pending: list[RequestOutput] = []
        self._waiter: asyncio.Future[None] | None = None

    def push(self, output: RequestOutput) -> None:
        """Add an output; called on the event loop."""
        self._usage.num_output_tokens += len(output.token_ids)
        if output.request_id in self._first_ids:
            self._first_ids.discard(output.request_id)
            self._usage.num_cached_tokens += output.num_cached_tokens
        if output.finish_reason is not None:
            self.unfinished.discard(output.request_id)
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


class EngineClient:
    """The engine as request handlers see it.

    Args:
        make_engine: receives the function to which the engine must hand its outputs; that breaks
            the circle between the two objects.
        request_timeout: seconds after a request's arrival at which it ends with an error.
    """

    def __init__(
        self,
        make_engine: Callable[[OutputSink], Engine | EngineGroups],
        request_timeout: float | None = None,
    ) -> None:
        self.engine = make_engine(self.deliver)
        self.is_draining = False
        self.num_refused = Counter(queue_full=0, share_full=0)
        self._request_timeout = request_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self.latencies = Latencies()
        self.traces: Traces | None = None
        self._streams: dict[str, tuple[TokenStream, Progress | None]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._pace = Pace()

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Name the event loop that serves requests; before the first `open`."""
        self._loop = loop

    @property
    def engines(self) -> Sequence[Engine]:
        """One for each group of ranks."""
        return self.engine.engines if isinstance(self.engine, EngineGroups) else [self.engine]

    @property
    def one_engine(self) -> Engine | None:
        """The engine, None where there are several."""
        return None if isinstance(self.engine, EngineGroups) else self.engine

    @property
    def num_open(self) -> int:
        """Requests submitted and not yet finished."""
        return len(self._streams)

    @contextmanager
    def open(
        self, requests: Sequence[Request], usage: Usage, *, is_measured: bool = True
    ) -> Iterator[TokenStream]:
        """Submit requests and stream their outputs; leaving the block early aborts them.

        What they generate is added to `usage` as it comes, and their latencies to ours if
        `is_measured`.

        The one release path: finished, failed, cancelled or left by its client, a request is
        forgotten here and, where it still runs, aborted in the engine.

        Raises:
            ApiError: 503 when the engine has failed, is stopping, or its queue is full; 429 when
                this tenant has its share of the queue.
        """
        self.check_open()
        assert self._loop is not None, "bind() comes first"
        stream = TokenStream(self._loop, requests, usage)
        self._idle.clear()
        self._pace.open(requests, time.monotonic())
        for request in requests:
            progress = Progress(request.arrival_time) if is_measured else None
            self._streams[request.request_id] = stream, progress
        if self.traces is not None and is_measured:
            self.traces.submit(requests)
        timer = self._start_timer(stream, requests[0].arrival_time)
        try:
            for request in requests:
                self.engine.submit(request)
            yield stream
        except QueueFullError as error:
            raise self._refusal(error) from error
        except EngineError as error:
            raise ApiError(503, str(error), code="engine_failed") from error
        finally:
            if timer is not None:
                timer.cancel()
            for request_id in stream.unfinished:
                self._forget(request_id)
                self.engine.abort(request_id)

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Take the outputs of one step; called on the engine thread."""
        assert self._loop is not None, "bind the event loop first"
        try:
            self._loop.call_soon_threadsafe(self._dispatch, outputs)
        except RuntimeError:  # the loop has closed: the server has stopped, no one reads
            logger.debug("outputs of %d requests came too late", len(outputs))

    def seconds_until_room(self, num_finishes: int = 1) -> int:
        """Seconds until so many requests should have ended; see Pace."""
        seconds = self._pace.seconds_until(num_finishes, time.monotonic())
        return max(1, min(MAX_RETRY_AFTER, math.ceil(seconds)))

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
            self._end(
                request_id,
                stream,
                message,
                "engine_failed" if self.engine.failure else "shutting_down",
            )

    def _end(self, request_id: str, stream: TokenStream, message: str, code: str) -> None:
        output = RequestOutput(
            request_id, text="", finish_reason="error", error=message, error_code=code
        )
        self._forget(request_id, output)
        self.engine.abort(request_id)
        stream.push(output)

    def _start_timer(self, stream: TokenStream, arrival_time: float) -> asyncio.TimerHandle | None:
        """End what is unfinished of a stream when its time is over."""
        seconds = self._request_timeout
        if seconds is None:
            return None
        assert self._loop is not None, "bind the event loop first"

        def end_late() -> None:
            message = f"the request took longer than {seconds:g} s (--request-timeout)"
            for request_id in tuple(stream.unfinished):
                self._end(request_id, stream, message, "timeout")

        return self._loop.call_later(arrival_time + seconds - time.monotonic(), end_late)

    def _refusal(self, error: QueueFullError) -> ApiError:
        is_share = isinstance(error, ShareFullError)
        code = "share_full" if is_share else "queue_full"
        self.num_refused[code] += 1
        wait = self.seconds_until_room(error.num_finishes)
        return ApiError(
            429 if is_share else 503, str(error), code=code, headers={"Retry-After": str(wait)}
        )

    def check_open(self) -> None:
        """Raise ApiError 503 when the engine has failed, is stopping or has waited too long."""
        if self.engine.failure is not None:
            raise ApiError(503, self.engine.failure, code="engine_failed")
        if self.is_draining:
            raise ApiError(
                503, "the server is shutting down", code="draining", headers={"Retry-After": "30"}
            )
        if self.engine.refusal is not None:
            raise ApiError(
                503, self.engine.refusal, code="recovering", headers={"Retry-After": "30"}
            )

    def _dispatch(self, outputs: list[RequestOutput]) -> None:
        now = time.monotonic()
        self._pace.add(outputs, now)
        for output in outputs:
            if output.request_id not in self._streams:
                continue  # its client has left; the engine has not heard of it yet
            stream, progress = self._streams[output.request_id]
            if progress is not None:
                self.latencies.observe(progress, output, now)
            if output.finish_reason is not None:
                self._forget(output.request_id, output)
            stream.push(output)

    def _forget(self, request_id: str, output: RequestOutput | None = None) -> None:
        _, progress = self._streams.pop(request_id, (None, None))
        if self.traces is not None and progress is not None:
            self.traces.finish(request_id, progress, output, time.monotonic())
        self._pace.close(request_id)
        if not self._streams:
            self._idle.set()

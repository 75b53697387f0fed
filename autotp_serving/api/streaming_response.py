"""The streaming response: one piece of body per piece of output. Rank 0 only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from autotp_serving.api.engine_client import EngineClient
from autotp_serving.request import Request, RequestOutput

Render = Callable[[Sequence[RequestOutput]], bytes]

PATIENCE_SECONDS = 120.0
"""A client that takes nothing of its stream for so long has left, whatever its connection says."""


class TokenStreamResponse(Response):
    """Submits its requests when it starts and releases them when it ends, however it ends.

    Nothing is held between the handler's return and the start, so a client that leaves in between
    leaks nothing; and a refusal by the engine still becomes a plain HTTP error.
    """

    def __init__(
        self,
        engine: EngineClient,
        requests: Sequence[Request],
        render: Render,
        *,
        media_type: str,
        head: Callable[[], bytes] = bytes,
        tail: Callable[[], bytes] = bytes,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._render = render
        self._head = head
        self._tail = tail
        self.status_code = 200
        self.background = None
        self.media_type = media_type
        # Proxies must pass each token on at once, and keep none.
        self.init_headers(
            {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with _Patience() as patience:

            async def send_body(body: bytes, *, is_last: bool = False) -> None:
                patience.begin()
                message = {"type": "http.response.body", "body": body, "more_body": not is_last}
                await send(message)
                patience.end()

            record = scope["state"]["record"]
            record.streams = True
            with self._engine.open(self._requests, record.usage) as stream:
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
                if body := self._head():
                    await send_body(body)
                async for outputs in stream:
                    body = self._render(outputs)
                    if body:
                        await send_body(body)
            await send_body(self._tail(), is_last=True)


class _Patience:
    """Cancels the task it is made in once something lasts too long; a timer a stream, no more."""

    def __enter__(self) -> _Patience:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None, "responses run in tasks"
        self._task = task
        self._since: float | None = None
        self._timer = self._loop.call_later(PATIENCE_SECONDS, self._check)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def begin(self) -> None:
        """Something begins that may last too long."""
        self._since = self._loop.time()

    def end(self) -> None:
        """It did not."""
        self._since = None

    def _check(self) -> None:
        if self._since is not None and self._loop.time() - self._since >= PATIENCE_SECONDS:
            self._task.cancel()
        else:
            self._timer = self._loop.call_later(PATIENCE_SECONDS, self._check)

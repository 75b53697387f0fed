"""The streaming response: one piece of body per piece of output. Rank 0 only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from autotp_serving.api.streams import AsyncEngine
from autotp_serving.request import Request, RequestOutput

Render = Callable[[Sequence[RequestOutput]], bytes]


class TokenStreamResponse(Response):
    """Submits its requests when it starts and releases them when it ends, however it ends.

    Nothing is held between the handler's return and the start, so a client that leaves in between
    leaks nothing; and a refusal by the engine still becomes a plain HTTP error.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        requests: Sequence[Request],
        render: Render,
        *,
        media_type: str,
        tail: Callable[[], bytes] = bytes,
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._render = render
        self._tail = tail
        self.status_code = 200
        self.background = None
        self.media_type = media_type
        # Proxies must pass each token on at once, and keep none.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._engine.open(self._requests, scope["state"]["record"].usage) as stream:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            async for outputs in stream:
                body = self._render(outputs)
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": self._tail(), "more_body": False})

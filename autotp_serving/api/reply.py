"""How what was admitted is run and answered, as a whole or in events. Rank 0 only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from autotp_serving.api.engine_client import EngineClient
from autotp_serving.api.streaming_response import TokenStreamResponse
from autotp_serving.request import Request, RequestOutput

EVENT_TYPE = "text/event-stream"
WHOLE_OR_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, EVENT_TYPE: {}}}
}
"""What the OpenAPI schema tells of such a route."""


class Writer(Protocol):
    """Turns the outputs of one HTTP request into a dialect's reply."""

    def collect(self, outputs: Sequence[RequestOutput]) -> None:
        """Keep outputs for the whole reply. Raises ApiError when one of them has failed."""
        ...

    def reply(self) -> dict[str, Any]:
        """The whole reply."""
        ...

    def begin(self) -> bytes:
        """What begins a stream, before there is any output."""
        ...

    def events(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The events of some outputs."""
        ...

    def end(self) -> bytes:
        """What ends a stream."""
        ...


async def answer(
    engine: EngineClient,
    http_request: HttpRequest,
    requests: Sequence[Request],
    writer: Writer,
    *,
    streams: bool,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Run what was admitted, and reply.

    Args:
        engine: runs it.
        http_request: its record counts the tokens.
        requests: what was admitted.
        writer: of the reply.
        streams: the client wants events.
        headers: of the reply.
    """
    if streams:
        return TokenStreamResponse(
            engine, requests, writer.events, media_type=EVENT_TYPE,
            head=writer.begin, tail=writer.end, headers=headers,
        )  # fmt: skip
    with engine.open(requests, http_request.state.record.usage) as stream:
        async for outputs in stream:
            writer.collect(outputs)
    return JSONResponse(writer.reply(), headers=headers and dict(headers))

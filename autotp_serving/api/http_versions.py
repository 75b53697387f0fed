"""Requests that speak another version of HTTP than 1.1, or would like to. Rank 0 only.

uvicorn leaves them out: an upgrade that nobody has to take up (`Upgrade: h2c`), and HTTP/1.0, which
knows no chunks.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

HOP_HEADERS = frozenset({b"upgrade", b"http2-settings"})


def write_head_without_upgrade(
    method: bytes, url: bytes, version: bytes, headers: Iterable[tuple[bytes, bytes]]
) -> bytes:
    """A request's head as it would be without its wish for another protocol."""
    lines = [method + b" " + url + b" HTTP/" + version]
    for name, value in headers:
        if name == b"connection":
            words = [word.strip() for word in value.lower().split(b",")]
            value = b", ".join(word for word in words if word not in HOP_HEADERS)
        if name not in HOP_HEADERS:
            lines.append(name + b": " + value)
    return b"\r\n".join([*lines, b"", b""])


async def answer_without_chunks(
    app: ASGIApp, cycle: RequestResponseCycle, scope: Scope, receive: Receive, send: Send
) -> None:
    """Send an answer whose length is not known beforehand up to the connection's end."""
    is_endless = False

    async def send_plainly(message: Message) -> None:
        nonlocal is_endless
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            is_endless = b"content-length" not in names
            if is_endless:
                cycle.chunked_encoding = False
        elif is_endless:  # to uvicorn each piece is all that it waits for
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    await app(scope, receive, send_plainly)

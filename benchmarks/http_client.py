"""A small HTTP/1.1 client that stamps every piece of a response the moment it arrives.

Why not a library: the client must never be what is measured. Here a streamed event costs one
callback that stores (time, bytes); everything else waits until the response is over. On the same
streams of 500 events this took 32 to 46 us of processor time per event, httpx 78 to 82 us
(Python 3.11, one EPYC core); `tests/benchmark/test_client_speed.py` compares the two again.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

Piece = tuple[float, bytes]

MAX_IDLE_SECONDS = 1.0
CONNECT_SECONDS = 30.0


@dataclass
class Response:
    """One response; `pieces` are the parts of the body with their times of arrival."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    finished: float = 0.0

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(data for _, data in self.pieces)


class HttpFailure(Exception):
    """A request that brought no whole response; the message is its kind, for counting.

    `response` holds what had arrived by then.
    """

    def __init__(self, kind: str, response: Response | None = None) -> None:
        super().__init__(kind)
        self.response = response or Response()


class _Connection(asyncio.Protocol):
    """One connection; carries one request at a time."""

    def __init__(self, on_body: Callable[[bytes], None]) -> None:
        self.transport: asyncio.Transport | None = None
        self.is_reusable = False
        self._on_body = on_body
        self._start()

    def _start(self) -> None:
        self.response = Response()
        self.done: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self.last_data = time.perf_counter()
        self._buffer = b""
        self._body_left: int | None = None  # of the body or chunk; None: up to the end
        self._is_chunked = False
        self._has_headers = False

    async def exchange(self, request: bytes, timeout: float, stall_timeout: float) -> Response:
        """Send a request and wait for the end of its response. Raises HttpFailure."""
        assert self.transport is not None
        self._start()
        self.is_reusable = False
        deadline = self.last_data + timeout
        if self.transport.is_closing():
            raise HttpFailure("connection closed before the response")
        self.transport.write(request)
        try:
            while True:
                now = time.perf_counter()
                if now >= deadline:
                    raise HttpFailure(f"not finished after {timeout:g} s", self.response)
                stalled = self.last_data + stall_timeout
                if now >= stalled:
                    kind = f"stalled: nothing arrived for {stall_timeout:g} s"
                    raise HttpFailure(kind, self.response)
                # Looks again only when the silence could be long enough: no timer per event.
                await asyncio.wait((self.done,), timeout=min(deadline, stalled) - now)
                if self.done.done():
                    return self.done.result()
        finally:
            if not self.is_reusable:
                self.done.cancel()  # nobody will ask how the connection ended
                self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self.last_data = now
        if self.done.done():  # bytes after the end: not a connection to trust again
            self.is_reusable = False
            return
        self._buffer = self._buffer + data if self._buffer else data
        try:
            self._parse(now)
        except ValueError:
            self._fail("the response is not HTTP")

    def connection_lost(self, error: Exception | None) -> None:
        self.is_reusable = False
        if self.done.done():
            return
        until_close = self._has_headers and not self._is_chunked and self._body_left is None
        if until_close and error is None:
            self._finish(time.perf_counter(), keep=False)
        elif self._has_headers:
            self._fail("connection closed in mid-response")
        else:
            self._fail("connection closed before the response")

    def _parse(self, now: float) -> None:
        if not self._has_headers and not self._parse_headers():
            return
        while not self.done.done():
            if self._is_chunked and self._body_left is None:
                if not self._parse_chunk_size(now):
                    return
                continue
            if self._body_left == 0 and not self._is_chunked:
                self._finish(now, keep=True)
                return
            if not self._buffer:
                return
            size = len(self._buffer) if self._body_left is None else self._body_left
            data, self._buffer = self._buffer[:size], self._buffer[size:]
            self.response.pieces.append((now, data))
            self._on_body(data)
            if self._body_left is not None:
                self._body_left -= len(data)
                if self._body_left == 0 and self._is_chunked:
                    self._body_left = None

    def _parse_headers(self) -> bool:
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return False
        self._buffer = rest
        status_line, *lines = head.decode("latin-1").split("\r\n")
        version, status = status_line.split(" ")[:2]
        if not version.startswith("HTTP/1."):
            raise ValueError(status_line)
        self.response.status = int(status)
        for line in lines:
            name, _, value = line.partition(":")
            self.response.headers[name.strip().lower()] = value.strip()
        headers = self.response.headers
        self._is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        if not self._is_chunked and "content-length" in headers:
            self._body_left = int(headers["content-length"])
        self._has_headers = True
        return True

    def _parse_chunk_size(self, now: float) -> bool:
        line, separator, rest = self._buffer.lstrip(b"\r\n").partition(b"\r\n")
        if not separator:
            return False
        size = int(line.split(b";")[0], 16)
        self._buffer = rest
        if size == 0:
            # Trailers are not used by the servers that we speak to; the final empty line may come
            # with the next packet, so the connection is kept only when it is here already.
            keep = rest == b"\r\n"
            self._buffer = b""
            self._finish(now, keep=keep)
            return True
        self._body_left = size
        return True

    def _finish(self, now: float, *, keep: bool) -> None:
        self.response.finished = now
        closing = self.response.headers.get("connection", "").lower() == "close"
        self.is_reusable = keep and not closing and not self._buffer
        self.done.set_result(self.response)

    def _fail(self, kind: str) -> None:
        self.is_reusable = False
        if not self.done.done():
            self.done.set_exception(HttpFailure(kind, self.response))


class HttpClient:
    """Requests to one server over as many kept-alive connections as are in use at a time."""

    def __init__(
        self,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        timeout: float = 600.0,
        stall_timeout: float = 60.0,
        on_body: Callable[[bytes], None] = lambda data: None,
    ) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"'{url}' is not a URL: write http://127.0.0.1:8000")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._path = parts.path.rstrip("/")
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        lines = {"Host": parts.netloc.rpartition("@")[2], "Accept": "*/*"} | (headers or {})
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._timeout = timeout
        self._stall_timeout = stall_timeout
        self._on_body = on_body
        self._idle: list[_Connection] = []

    async def get(self, path: str) -> Response:
        """GET a path. Raises HttpFailure."""
        return await self._send(f"GET {self._path}{path} HTTP/1.1\r\n{self._head}\r\n".encode())

    async def post(self, path: str, body: bytes) -> Response:
        """POST a JSON body to a path. Raises HttpFailure."""
        head = (
            f"POST {self._path}{path} HTTP/1.1\r\n{self._head}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return await self._send(head.encode() + body)

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            if connection.transport is not None:
                connection.transport.abort()
        self._idle.clear()

    async def _send(self, request: bytes) -> Response:
        connection = self._take_idle() or await self._connect()
        response = await connection.exchange(request, self._timeout, self._stall_timeout)
        if connection.is_reusable:
            self._idle.append(connection)
        return response

    def _take_idle(self) -> _Connection | None:
        """A connection used a moment ago; an older one might be closed just now by the server.

        There is no second try on another connection: it would hide a server that hangs up.
        """
        while self._idle:
            connection = self._idle.pop()
            assert connection.transport is not None
            age = time.perf_counter() - connection.last_data
            if connection.is_reusable and age < MAX_IDLE_SECONDS:
                return connection
            connection.transport.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await asyncio.wait_for(
                loop.create_connection(
                    lambda: _Connection(self._on_body), self._host, self._port, ssl=self._ssl
                ),
                CONNECT_SECONDS,
            )
        except asyncio.TimeoutError:
            raise HttpFailure(f"cannot connect within {CONNECT_SECONDS:g} s") from None
        except OSError as error:
            reason = error.strerror or type(error).__name__
            if isinstance(error, ssl.SSLCertVerificationError):
                cure = "set SSL_CERT_FILE to a file with its certificate in order to trust it"
                reason = f"{error.verify_message}; {cure}"
            if isinstance(error, ConnectionRefusedError):
                reason = "connection refused"
            raise HttpFailure(f"cannot connect: {reason}") from error
        return connection

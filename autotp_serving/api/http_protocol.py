"""uvicorn's reading of HTTP, with bounds and with what it leaves out. Rank 0 only.

Bounds: how many bytes a head may have, how long a connection may be without a request, how long
what a refused client still sends is read. Left out by uvicorn: other versions of HTTP
(`http_versions`), and clients that close their own half of the connection and still read the other
(`half_closed`).

Past 250 lines, since uvicorn's protocol is one class, and each of these is a change of what it does
with the same few fields.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import httptools
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from autotp_serving.api.connections import FULL, WAIT_SECONDS, Place
from autotp_serving.api.errors import render_refusal
from autotp_serving.api.half_closed import HalfClosedWatch
from autotp_serving.api.http_versions import answer_without_chunks, write_head_without_upgrade

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

MAX_HEAD_BYTES = 256 * 2**10
"""Of address and headers, and of whatever else comes without being part of a body."""

LINGER_SECONDS = 10.0
MAX_LINGER_SECONDS = 30.0
"""For a client that was refused while it was sending to read why: until it pauses so long, and at
most."""

STUCK_SECONDS = 120.0
"""A client that takes nothing of what is written for so long has left."""


class ClosingTransport:
    """A connection as uvicorn's parts see it: to close it is left to the protocol."""

    def __init__(self, transport: asyncio.Transport, protocol: HttpProtocol) -> None:
        self.write = transport.write  # the transport's own: a token's way is no longer for this
        self.abort = transport.abort
        self.get_extra_info = transport.get_extra_info
        self.get_write_buffer_size = transport.get_write_buffer_size
        self.close = protocol.close
        self.is_closing = protocol.is_closing

    def let_go(self, transport: asyncio.Transport) -> None:
        """Of the protocol, whose connection has ended, and so of a circle that keeps it alive."""
        self.close, self.is_closing = transport.close, transport.is_closing


class HttpProtocol(HttpToolsProtocol):
    """One connection.

    The parser keeps all of a head, and copies what it has of a line at each new piece: an address
    of 100 MB would hold up everybody for many seconds.

    Args:
        place: is told when the connection waits for a request and when it has one.
        options: uvicorn's own.
    """

    def __init__(self, *, place: Place, **options: Any) -> None:
        super().__init__(**options)
        self.parser = self._make_parser()
        self._place = place
        self._connection: asyncio.Transport  # from `connection_made` on, as uvicorn's own is
        self._closing_transport: ClosingTransport
        self._num_head_bytes = 0
        self._gets_on = False
        self._has_started = False  # the head of a request
        self._has_answered = False
        self._is_deaf = False
        self._is_lingering = False
        self._heard = 0.0  # when what came last was thrown away
        self._running: RequestResponseCycle | None = None
        self._timer: asyncio.TimerHandle | HalfClosedWatch | None = None
        self._stuck_timer: asyncio.TimerHandle | None = None

    def _make_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # A request that comes after `Connection: close` is not read, and no error either.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    # The connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connection = cast(asyncio.Transport, transport)  # a stream's is no less
        super().connection_made(self._connection)
        self._closing_transport = ClosingTransport(self._connection, self)
        self.transport = cast(asyncio.Transport, self._closing_transport)  # all that uvicorn needs
        self._place.give_way = self._give_way
        self._place.expire = self._expire

    def connection_lost(self, exc: Exception | None) -> None:
        self._place.leave()
        self._stop_timer()
        self._stop_stuck_timer()
        super().connection_lost(exc)
        self._closing_transport.let_go(self._connection)

    def is_closing(self) -> bool:
        """Whether no more than the rest of an answer goes out."""
        return self._is_lingering or self._connection.is_closing()

    def close(self) -> None:
        """Close the connection once everything written is out.

        A client that still sends is heard out for a moment: the kernel would answer what is not
        read by a reset, and with that the client loses the answer.
        """
        if self.is_closing():
            return
        self._stop_timer()
        self._start_stuck_timer()
        is_sending = self._has_started or (self.cycle is not None and self.cycle.more_body)
        if not is_sending:
            self._connection.close()
            return
        self._is_lingering = self._is_deaf = True
        self._place.work()
        self.flow.resume_reading()
        if self._connection.can_write_eof():
            self._connection.write_eof()
        self._heard = self.loop.time()
        self._linger(self._heard + MAX_LINGER_SECONDS)

    def _linger(self, end: float) -> None:
        wait = min(self._heard + LINGER_SECONDS, end) - self.loop.time()
        if wait > 0:
            self._timer = self.loop.call_later(wait, self._linger, end)
        else:
            self._connection.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_stuck_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.is_closing():
            self._stop_stuck_timer()

    def _start_stuck_timer(self) -> None:
        if self._stuck_timer is None:
            self._stuck_timer = self.loop.call_later(STUCK_SECONDS, self._connection.abort)

    def _stop_stuck_timer(self) -> None:
        if self._stuck_timer is not None:
            self._stuck_timer.cancel()
            self._stuck_timer = None

    def _give_way(self) -> None:
        """Leave at once, since somebody else needs the place."""
        if self._connection.get_write_buffer_size():  # it does not even take its last answer
            self._connection.abort()
            return
        if not self._has_answered:  # clients know that a connection may be closed between requests
            self._connection.write(render_refusal(503, FULL, code="too_many_connections"))
        self._is_deaf = True
        self._connection.close()

    def _expire(self) -> None:
        """Leave, since no request has come."""
        if self._has_started:
            message = f"no whole head of a request came within {WAIT_SECONDS:g} s"
            self._refuse(408, message)
        else:
            self._connection.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer what never becomes a request for the application, or no longer."""
        current = self._running
        if current is not None and not current.response_complete:
            if not current.more_body:  # the fault is in what came after it
                self._is_deaf = True
                if self.cycle.more_body:
                    self.pipeline.popleft()
                last = self.pipeline[0][0] if self.pipeline else current
                last.keep_alive = False
                return
            current.disconnected = True
            current.message_event.set()
            if current.response_started:
                self._connection.close()
                return
        self._connection.write(render_refusal(status, message))
        self._is_deaf = True
        self._has_started = True  # and may well go on
        self.close()

    # What comes in

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            self._heard = self.loop.time()
            return
        self._unset_keepalive_if_required()
        self._gets_on = False
        self._feed(data)
        self._num_head_bytes = 0 if self._gets_on else self._num_head_bytes + len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self._is_deaf:
            self._refuse(400, f"the head of a request may have {MAX_HEAD_BYTES} bytes")

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self._refuse(400, "this is no HTTP request that can be read")

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Read a head again without its wish for another protocol, and then what follows it.

        The parser takes everything after such a head for that protocol, the body too.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(405, "this server is no proxy: it does not take CONNECT")
            return
        version = self.parser.get_http_version().encode()
        head = write_head_without_upgrade(method, self.url, version, self.headers)
        self.parser = self._make_parser()
        self._feed(head + rest)

    def on_message_begin(self) -> None:
        self._has_started = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._gets_on = True
        if self.parser.should_upgrade():
            return  # _ignore_upgrade comes next
        self._has_started = False
        self._place.work()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._gets_on = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._gets_on = True
        if not self.parser.should_upgrade():
            super().on_message_complete()

    # What goes out

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        if self._place.is_spare:
            cycle.scope["state"]["is_spare"] = True
            cycle.keep_alive = False
        if cycle.scope["http_version"] != "1.1":
            # Starlette describes the same calls in types of its own.
            plainly = partial(answer_without_chunks, cast(ASGIApp, app), cycle)
            app = cast("ASGI3Application", plainly)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self._has_answered = True
        super().on_response_complete()
        if self.cycle.response_complete and not self.pipeline and not self.is_closing():
            self._place.wait()

    # A client that sends no more

    def eof_received(self) -> bool | None:  # type: ignore[override]  # asyncio's, uvicorn has less
        """Keep the other half open for an answer that is still to come, while it can be read."""
        cycle = self.cycle
        if self._is_lingering or cycle is None or cycle.response_complete or cycle.more_body:
            return None
        if not self._connection.can_write_eof():
            return None  # TLS ends as a whole
        self._is_deaf = True
        cycle.keep_alive = False
        self._timer = HalfClosedWatch(self._connection, self.is_closing, lambda: self._running)
        return True

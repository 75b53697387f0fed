"""uvicorn's reading of HTTP, with an end to how long a request's head may become. Rank 0 only."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 256 * 2**10
"""Of address and headers, and of whatever else comes without being part of a body."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Refuses a client that sends and sends and gets neither to a body nor to an end.

    The parser keeps all of a head, and copies what it has of a line at each new piece: an address
    of 100 MB holds up everybody for many seconds.
    """

    _num_head_bytes = 0
    _gets_on = False

    def data_received(self, data: bytes) -> None:
        self._gets_on = False
        super().data_received(data)
        self._num_head_bytes = 0 if self._gets_on else self._num_head_bytes + len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head of a request may have {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        self._gets_on = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._gets_on = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._gets_on = True
        super().on_message_complete()

"""What every HTTP request passes through, whatever its route. Rank 0 only.

The guard names the request, asks for the API key, sends away pages under foreign names, reads the
body within its limits of size and time, ends the handler when the client leaves, and writes one
line to the access log. Neither prompts nor keys reach the log.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autotp_serving.api.api_keys import KEY_HEADERS, ApiKeys
from autotp_serving.api.connections import FULL
from autotp_serving.api.engine_client import Usage
from autotp_serving.api.errors import ApiError, error_response
from autotp_serving.api.hosts import AllowedHosts
from autotp_serving.api.large_bodies import LargeBodies
from autotp_serving.api.request_body import ClientLeftError, find_encoding, read_body
from autotp_serving.api.route_paths import RoutePaths
from autotp_serving.request import Adapter

if TYPE_CHECKING:
    from autotp_serving.api.traces import Traces

logger = logging.getLogger("autotp_serving.access")

MAX_LOGGED_PATH = 200
CLIENT_ID = re.compile(rb"[0-9A-Za-z._:/+=@-]{1,128}")
CLIENT_LEFT = 499  # nginx's number for a client that closed the connection first
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
# Served without a key: what load balancers ask, and the page in which a person can type one.
OPEN_PATHS = frozenset({"/", "/docs", "/health", "/ready"})


@dataclass
class RequestRecord:
    """What the access log tells of one HTTP request; handlers fill in `usage` and `headers`.

    Attributes:
        request_id: ours, unique.
        client_id: the name that the client gave it, "" for none.
        tenant: whose it is; see `ApiKeys`.
        headers: of the reply, whatever it is.
        streams: the reply comes in pieces, as they are made.
        adapter: that it asks for, by its model's name.
    """

    request_id: str
    arrival_time: float
    tenant: str = ""
    status: int = 0
    is_answered: bool = False
    usage: Usage = field(default_factory=Usage)
    client_id: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    streams: bool = False
    adapter: Adapter | None = None


class RequestGuard:
    """Outermost ASGI layer; plain ASGI, since wrapped responses would hide who left."""

    def __init__(
        self,
        app: ASGIApp,
        paths: RoutePaths,
        max_body_size: int,
        large_bodies: LargeBodies,
        api_keys: ApiKeys,
        allowed_hosts: AllowedHosts,
        traces: Traces | None = None,
    ) -> None:
        self.app = app
        self.paths = paths
        self.max_body_size = max_body_size
        self.large_bodies = large_bodies
        self.api_keys = api_keys
        self.allowed_hosts = allowed_hosts
        self.traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = RequestRecord(f"req-{uuid.uuid4().hex}", time.monotonic())
        scope.setdefault("state", {})["record"] = record
        if (path := self.paths.find(scope["path"])) != scope["path"]:
            scope = {**scope, "path": path, "raw_path": path.encode("utf-8")}
        record.client_id = _find_client_id(scope)
        record.headers["X-Request-Id"] = record.client_id or record.request_id

        traces = None if scope["path"] in QUIET_PATHS else self.traces
        if traces is not None:
            traces.begin(scope, record, self.paths)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                own = [
                    (name.lower().encode("ascii"), value.encode("ascii"))
                    for name, value in record.headers.items()
                ]
                message["headers"] = [*message.get("headers", ()), *own]
            elif not message.get("more_body", False):
                record.is_answered = True
            await send(message)

        try:
            await self._serve(scope, receive, send_named, record)
        except Exception:
            record.status = record.status or 500
            raise
        finally:
            _log(scope, record)
            if traces is not None:
                traces.end(record)

    def _find_refusal(self, scope: Scope, tenant: str | None) -> Response | None:
        """What is answered to a request whose body need not be read."""
        is_probe = scope["path"] in QUIET_PATHS
        if scope["state"].get("is_spare") and not is_probe:
            return error_response(
                503, FULL, code="too_many_connections",
                headers={"Retry-After": "1", "Connection": "close"},
            )  # fmt: skip
        stranger = self.allowed_hosts.find_stranger(scope["headers"])
        if stranger is not None:
            return error_response(
                403,
                f"a browser calls this server '{stranger[:MAX_LOGGED_PATH]}', which is none of its "
                "names: use its address, or start it with --allowed-host NAME",
                code="host_not_allowed",
                headers={"Connection": "close"},
            )
        if tenant is None and scope["path"] not in OPEN_PATHS:
            return _refuse_stranger(scope)
        encoding = find_encoding(scope)
        if encoding is not None:
            return error_response(
                415,
                f"the body is packed as '{encoding[:MAX_LOGGED_PATH]}': send it as it is, without "
                "Content-Encoding",
                code="unsupported_encoding",
                headers={"Accept-Encoding": "identity", "Connection": "close"},
            )
        return None

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, record: RequestRecord
    ) -> None:
        tenant = self.api_keys.find_tenant(scope["headers"])
        refusal = self._find_refusal(scope, tenant)
        if refusal is not None:  # before the body is read: strangers cost no memory
            await refusal(scope, receive, send)
            return
        record.tenant = tenant or ""
        try:
            body = await read_body(scope, receive, self.max_body_size, self.large_bodies)
        except ApiError as error:
            refusal = error_response(
                error.status, error.message, error.param, error.code, error.headers
            )
            await refusal(scope, receive, send)
            return
        except ClientLeftError:
            record.status = CLIENT_LEFT
            return
        _label_as_json(scope)
        if scope["method"] == "HEAD":  # uvicorn, which knows what it was, leaves the body out
            scope = {**scope, "method": "GET"}
        await _run_while_connected(self.app, scope, body, receive, send)
        if not record.is_answered:
            record.status = CLIENT_LEFT


def _find_client_id(scope: Scope) -> str:
    """The client's own name for its request, where it is one that may stand in a log."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and CLIENT_ID.fullmatch(value):
            found: str = value.decode("ascii")
            return found
    return ""


def _refuse_stranger(scope: Scope) -> Response:
    shows_key = any(name in KEY_HEADERS for name, _ in scope["headers"])
    return error_response(
        401,
        # Clients tell a refused key by these words of OpenAI's.
        "Incorrect API key provided: it is not known here"
        if shows_key
        else "this server wants an API key, sent as Authorization: Bearer KEY or x-api-key: KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
    )


def _label_as_json(scope: Scope) -> None:
    """Call every body JSON: all our routes take nothing else, and curl -d says form.

    Not for browsers, which always name an origin: foreign pages may send forms without asking.
    """
    is_browser = any(name == b"origin" for name, _ in scope["headers"])
    if scope["method"] == "POST" and not is_browser:
        others = [header for header in scope["headers"] if header[0] != b"content-type"]
        scope["headers"] = [*others, (b"content-type", b"application/json")]


async def _run_while_connected(
    app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send
) -> None:
    """Run `app` on a body already read; cancel it if the client leaves before the answer's end.

    Waiting for the disconnect here covers every phase of every route: tokenizing, queued, prefill,
    decode, streaming or not. The handlers release what they hold when they are cancelled.
    """
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    gone = asyncio.ensure_future(_wait_for_disconnect(receive))

    async def receive_rest() -> Message:
        if messages:
            return messages.pop()
        await asyncio.shield(gone)
        return {"type": "http.disconnect"}

    work = asyncio.ensure_future(app(scope, receive_rest, send))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if scope["state"]["record"].is_answered:  # servers report the end as a disconnect too
            await asyncio.wait((work,))
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.wait((work, gone))
    if not work.cancelled() and (error := work.exception()) is not None:
        raise error


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _log(scope: Scope, record: RequestRecord) -> None:
    if scope["path"] in QUIET_PATHS and record.status == 200:
        return
    fields = {
        "method": scope["method"],
        # Decoded paths may hold line breaks, which would forge lines of this log.
        "path": scope["path"].encode("unicode_escape").decode("ascii")[:MAX_LOGGED_PATH],
        "status": record.status,
        "seconds": round(time.monotonic() - record.arrival_time, 6),
        "prompt_tokens": record.usage.num_prompt_tokens,
        "output_tokens": record.usage.num_output_tokens,
        "request_id": record.request_id,
    }
    line = "%s %s %d %.3fs in=%d out=%d %s"
    arguments = tuple(fields.values())
    if record.client_id:
        fields["client_request_id"] = record.client_id
        line += " %s"
        arguments += (record.client_id,)
    if record.tenant:
        fields["api_key"] = record.tenant  # its number, not the key
        line += " (%s)"
        arguments += (record.tenant,)
    logger.info(line, *arguments, extra={"fields": fields})

"""What a refusal looks like: OpenAI's error body, Anthropic's on its own routes. Rank 0 only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from autotp_serving.api.anthropic.error_shape import anthropic_error, is_anthropic_path
from autotp_serving.request import RequestError, RequestOutput

MAX_NAMED_ERRORS = 5
MAX_PARAM_LEN = 200
MAX_MESSAGE_LEN = 2000

LONE_SURROGATE = "holds half of a surrogate pair, which is no unicode text"


class ApiError(Exception):
    """A request answered with an error status; `param` names the field at fault, if one is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers


STATUS_OF_CODE = {
    "timeout": 504,
    "shutting_down": 503,
    "recovering": 503,
    "structure_too_complex": 400,
}


def check_reason(output: RequestOutput) -> None:
    """Raise ApiError for an output that ends its request other than by its own end."""
    if output.finish_reason not in (None, "stop", "length"):
        code = output.error_code or "engine_failed"
        message = output.error or "the request was aborted"
        raise ApiError(STATUS_OF_CODE.get(code, 500), message, code=code)


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The error object that all routes but Anthropic's answer with."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {
        "error": {
            "message": message[:MAX_MESSAGE_LEN],
            "type": kind,
            "param": param and param[:MAX_PARAM_LEN],
            "code": code,
        }
    }


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as an HTTP response."""
    return _ErrorResponse(ApiError(status, message, param=param, code=code, headers=headers))


class _ErrorResponse(Response):
    """Takes its shape when it is sent: by then it is known to which route."""

    def __init__(self, error: ApiError) -> None:
        body = error_body(error.status, error.message, error.param, error.code)
        super().__init__(_to_json(body), error.status, error.headers, media_type="application/json")
        self._message = error.message[:MAX_MESSAGE_LEN]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_anthropic_path(scope["path"]):
            self.body = _to_json(anthropic_error(self.status_code, self._message))
            self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def _to_json(body: Mapping[str, Any]) -> bytes:
    # ASCII only: a client's field name may hold a lone surrogate, which UTF-8 cannot carry.
    return json.dumps(body).encode("ascii")


def render_refusal(status: int, message: str, code: str | None = None) -> bytes:
    """An error as it goes over the wire, where there is no request to answer."""
    body = _to_json(error_body(status, message, code=code))
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n"
    )
    if status == 503:
        head += "Retry-After: 1\r\n"
    return head.encode("ascii") + b"\r\n" + body


def describe_validation(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """Put pydantic's errors into one sentence and name the first field at fault."""
    problems: dict[str, list[str]] = {}
    for error in errors:
        kind = error["type"]
        if kind == "json_invalid":
            position = error["loc"][-1]
            return f"the body is not JSON: {error['ctx']['error']} at character {position}", None
        param = _field_path(error["loc"][1:], body, is_missing=kind == "missing")
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, RequestError):  # a check over several fields names the one at fault
            param = ".".join(filter(None, (param, cause.field_name)))
            problem = str(cause)
        elif kind == "string_unicode":
            problem = LONE_SURROGATE
        elif not param:
            problem = "must be a JSON object"
        elif kind == "missing":
            problem = "is missing"
        elif kind == "extra_forbidden":
            problem = "is not a field of this request"
        else:
            problem = error["msg"].removeprefix("Value error, ")
        problems.setdefault(param, []).append(problem)
    sentences = [
        f"{param[:MAX_PARAM_LEN] or 'the body'}: {' or '.join(texts[:MAX_NAMED_ERRORS])}"
        for param, texts in list(problems.items())[:MAX_NAMED_ERRORS]
    ]
    if len(problems) > len(sentences):
        sentences.append(f"and {len(problems) - len(sentences)} more")
    return "; ".join(sentences), next(iter(problems)) or None


def _field_path(location: Sequence[str | int], body: Any, is_missing: bool) -> str:
    """The field's path as the client wrote it: pydantic's names of union members left out."""
    parts = []
    node = body
    for index, part in enumerate(location):
        is_last = index == len(location) - 1
        is_key = isinstance(node, dict) and part in node
        is_index = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if is_key or is_index:
            node = node[part]
        if is_key or is_index or (is_last and is_missing):
            parts.append(str(part))
    return ".".join(parts)


async def _on_api_error(_: Request, error: ApiError) -> Response:
    return error_response(error.status, error.message, error.param, error.code, error.headers)


async def _on_request_error(_: Request, error: RequestError) -> Response:
    return error_response(400, f"{error.field_name}: {error}", error.field_name)


async def _on_validation_error(_: Request, error: RequestValidationError) -> Response:
    message, param = describe_validation(error.errors(), error.body)
    return error_response(400, message, param)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    message = str(error.detail)
    if error.status_code == 400:  # FastAPI's, where JSON is too deep, too long or no text at all
        message = "the body cannot be read as JSON"
    elif error.status_code == 404:
        message = f"there is no {request.url.path}; see /docs"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    return error_response(error.status_code, message, headers=error.headers)


async def _on_bug(_: Request, error: Exception) -> Response:
    # The traceback goes to the log; its text may hold parts of a prompt, so it stays there.
    return error_response(500, f"internal error ({type(error).__name__}); see the server's log")


def install_error_handlers(app: FastAPI) -> None:
    """Make every failure of `app` answer in the one shape."""
    handlers: list[tuple[type[Exception], Any]] = [
        (ApiError, _on_api_error),
        (RequestError, _on_request_error),
        (RequestValidationError, _on_validation_error),
        (HTTPException, _on_http_error),
        (Exception, _on_bug),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)

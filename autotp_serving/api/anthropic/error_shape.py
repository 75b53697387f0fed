"""What a refusal looks like on Anthropic's routes, by status. Rank 0 only.

Apart from these routes, since errors are also written where there is no route yet: no key, no body.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

PATHS = frozenset({"/messages", "/messages/count_tokens"})

KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicErrorDetail(BaseModel):
    """What went wrong; the message begins with the field at fault, if one is."""

    type: str
    message: str


class AnthropicErrorReply(BaseModel):
    """Body of every reply of these routes that is not a success."""

    type: Literal["error"]
    error: AnthropicErrorDetail


def is_anthropic_path(path: str) -> bool:
    """True for the routes whose clients know these errors only."""
    return path.removeprefix("/v1").rstrip("/") in PATHS


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    """The error object, as a reply's body or an event of a stream."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}

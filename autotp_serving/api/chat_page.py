"""The chat page at /: one static file, under a policy that lets it reach us only. Rank 0 only."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

PAGE = Path(__file__).with_name("static") / "chat.html"


def page_routes() -> APIRouter:
    """The page, read once."""
    router = APIRouter(redirect_slashes=False)
    page = PAGE.read_bytes()
    headers = {
        "Content-Security-Policy": content_policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @router.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=headers)

    return router


def content_policy(page: bytes) -> str:
    """Only the page's own script and style run, and they speak to this server only."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hash_of(page, 'script')}",
            f"style-src {_hash_of(page, 'style')}",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        ]
    )


def _hash_of(page: bytes, tag: str) -> str:
    found = re.search(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
    assert found is not None, f"the page has no <{tag}>"
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1]).digest()).decode()}'"

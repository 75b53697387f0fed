"""Pages, each one static file under a policy that lets it reach us only. Rank 0 only.

The chat at /, and the routes at /docs: without internet, as nothing comes from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

STATIC = Path(__file__).with_name("static")
PAGES = {"/": "chat.html", "/docs": "docs.html"}


def page_routes() -> APIRouter:
    """The pages, read once."""
    router = APIRouter(redirect_slashes=False)
    for path, name in PAGES.items():
        router.add_api_route(path, _show((STATIC / name).read_bytes()), include_in_schema=False)
    return router


def _show(page: bytes) -> Callable[[], Awaitable[Response]]:
    headers = {
        "Content-Security-Policy": content_policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def show() -> Response:
        return HTMLResponse(page, headers=headers)

    return show


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

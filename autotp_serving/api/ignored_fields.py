"""Fields that are taken and change nothing: a provider's bookkeeping, as clients send it. Rank 0.

They are told in a header of the reply, so that nobody counts on them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, Field

from autotp_serving.api.schemas import bounded

HEADER = "X-Ignored-Fields"
MAX_NAMES = 32
MARK = {"x-ignored": True}

Ignored = Annotated[Any, bounded(), Field(json_schema_extra=MARK)]
"""The type of such a field. Null and false ask for nothing and are not told."""


def list_ignored(body: BaseModel) -> list[str]:
    """Names of the ignored fields that a body sets."""
    return [
        name
        for name, field in type(body).model_fields.items()
        if field.json_schema_extra == MARK and getattr(body, name) not in (None, False)
    ]


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The reply's header, none where nothing was ignored."""
    listed = list(dict.fromkeys(names))
    shown = ", ".join(listed[:MAX_NAMES]) + (", ..." if len(listed) > MAX_NAMES else "")
    return {HEADER: shown} if listed else {}

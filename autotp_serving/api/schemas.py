"""What all bodies are made of, checked at the door. Rank 0 only.

Strict and closed: a wrong type or an unknown field is an error, so a typo never goes unnoticed.
A body may be wrong in a million places, and listing them takes minutes and gigabytes: long lists
end at their first mistake, and what has too many entries is refused before any is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import GroupedMetadata
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from autotp_serving.api.errors import LONE_SURROGATE
from autotp_serving.request import RequestError

MAX_STOP_STRINGS = 64
MAX_STOP_LEN = 1024
"""Characters: the text is held back while it may be the beginning of one, and looked through."""

MAX_DEPTH = 64
"""Levels of objects and lists, in fields that take JSON of any shape."""

MAX_VALUES = 2**14
"""In one such field."""

MAX_FIELDS = 128
"""More than any body has."""


def check_unicode(text: str) -> str:
    """Refuse text that no encoding can carry."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(LONE_SURROGATE) from error
    return text


# Every string of a body: pydantic alone lets lone surrogates through in some places.
Text = Annotated[str, AfterValidator(check_unicode)]


NonEmptyText = Annotated[str, Field(min_length=1), AfterValidator(check_unicode)]
StopText = Annotated[
    str, Field(min_length=1, max_length=MAX_STOP_LEN), AfterValidator(check_unicode)
]
Stop = StopText | Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]
PRIORITY = "lower ones run earlier; other than 0 only with --scheduling-policy priority; default 0"


class StrictModel(BaseModel):
    """A body that refuses unknown fields and converts no types."""

    model_config = ConfigDict(
        strict=True, extra="forbid", json_schema_extra={"additionalProperties": {"type": "null"}}
    )

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if len(value) > MAX_FIELDS:
            name = next(key for key in value if key not in known)
            raise RequestError(name, "is not a field of this request, nor are others")
        # Null means the default, and of a field that there is not it asks for nothing.
        return {key: one for key, one in value.items() if one is not None or key in known}


class GenerousModel(StrictModel):
    """A part of a body that clients send back as they were given it: unknown fields are nothing."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"additionalProperties": True})


def at_most(num_entries: int) -> BeforeValidator:
    """Refuse an object or list of more entries, unseen."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > num_entries:
            raise ValueError(f"must have at most {num_entries} entries, not {len(value)}")
        return value

    return BeforeValidator(check)


def bounded() -> BeforeValidator:
    """Refuse JSON of any shape that is nested too deep or holds too many values."""

    def check(value: Any) -> Any:
        check_bounds(value)
        return value

    return BeforeValidator(check)


def check_bounds(value: Any) -> None:
    """Raise ValueError for JSON that is nested too deep or holds too many values."""
    level = [value]
    num_values = 0
    for depth in range(MAX_DEPTH + 1):
        num_values += len(level)
        if num_values > MAX_VALUES:
            raise ValueError(f"must hold at most {MAX_VALUES} values")
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below.extend(one.values())
            elif isinstance(one, list):
                below.extend(one)
        if not below:
            return
        if depth == MAX_DEPTH:
            break
        level = below
    raise ValueError(f"must be nested at most {MAX_DEPTH} levels deep")


class _Only(GroupedMetadata):
    """See `only`."""

    def __init__(self, allowed: tuple[Any, ...]) -> None:
        self.allowed = allowed

    def check(self, value: Any) -> Any:
        for one in self.allowed:
            # Booleans equal numbers in Python, not in JSON.
            if isinstance(value, bool) == isinstance(one, bool) and value == one:
                return value
        raise ValueError("is not supported yet: leave it out")

    def __iter__(self) -> Iterator[object]:
        yield AfterValidator(self.check)
        yield WithJsonSchema({"enum": list(self.allowed)})


def only(*values: Any) -> GroupedMetadata:
    """Marks a field that is not supported yet: it may be null or one of `values`."""
    return _Only((None, *values))


def as_tuple(stop: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings as the engine wants them."""
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


class ErrorDetail(StrictModel):
    """What went wrong; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(StrictModel):
    """Body of every reply that is not a success."""

    error: ErrorDetail

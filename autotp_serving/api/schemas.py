"""What all bodies are made of, checked at the door. Rank 0 only.

Strict and closed: a wrong type or an unknown field is an error, so a typo never goes unnoticed.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from autotp_serving.api.errors import LONE_SURROGATE

MAX_STOP_STRINGS = 64


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
Stop = NonEmptyText | Annotated[list[NonEmptyText], Field(max_length=MAX_STOP_STRINGS)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class StrictModel(BaseModel):
    """A body that refuses unknown fields and converts no types."""

    model_config = ConfigDict(strict=True, extra="forbid")


def only(*values: Any) -> Any:
    """The type of a field that is not supported yet: null or one of `values`."""
    allowed = (None, *values)

    def check(value: Any) -> Any:
        for one in allowed:
            # Booleans equal numbers in Python, not in JSON.
            if isinstance(value, bool) == isinstance(one, bool) and value == one:
                return value
        raise ValueError("is not supported yet: leave it out")

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": list(allowed)})]


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
    """Body of every answer that is not a success."""

    error: ErrorDetail

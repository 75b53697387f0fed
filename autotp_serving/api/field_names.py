"""Errors of the chat path in the words of another dialect's body. Rank 0 only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pydantic import ValidationError

from autotp_serving.api.errors import ApiError
from autotp_serving.request import RequestError


@contextmanager
def naming_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Have refusals name the field that the client sent.

    Args:
        names: of a chat completion's fields, and what each was made of.
    """

    def rename(field: str) -> str:
        first, dot, rest = field.partition(".")
        # What is under a field that was made of another has no place in the client's body.
        return names.get(first, f"{first}{dot}{rest}")

    try:
        yield
    except RequestError as error:
        raise RequestError(rename(error.field_name), str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        field = str(first["loc"][0]) if first["loc"] else getattr(cause, "field_name", "")
        problem = str(cause) if isinstance(cause, RequestError) else first["msg"]
        raise RequestError(rename(field), problem) from error
    except ApiError as error:
        raise _rename(error, rename(error.param or "")) from error


def _rename(error: ApiError, param: str) -> ApiError:
    message = error.message
    if error.param and message.startswith(f"{error.param}: "):
        message = f"{param}: {message.removeprefix(f'{error.param}: ')}"
    return ApiError(
        error.status, message, param=param or None, code=error.code, headers=error.headers
    )

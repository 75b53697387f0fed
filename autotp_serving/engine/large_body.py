"""What is wrong with a large body, found before rank 0 parses it. Runs in a worker of `sandbox`.

To parse megabytes of JSON is a single call of the standard library, which keeps the interpreter to
itself: on rank 0 every stream would wait for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

MAX_JSON_VALUES = 1_000_000
"""In one body: on rank 0, parsing that many takes about 0.1 s, in which nobody else is served."""

MAX_OTHER_VALUES = 2**17
"""In one body, prompts and tokens aside."""

MAX_ENTRIES = 2**14
"""In one list or object, prompts and tokens aside: no field takes more."""

PROMPT_FIELDS = ("prompt", "tokens")
"""Fields that hold token ids by the thousand."""

FOREIGN_KEYS = frozenset({"url", "data", "file_data"})
"""Of parts of messages that are images, sounds and files."""

MAX_NAME_LEN = 200


class Limits(NamedTuple):
    """Of a field: characters of a text, and ids in a list where it is of prompts or tokens."""

    max_chars: int
    max_tokens: int | None


Problem = dict[str, Any]
"""`problem` is one of "json" (with `reason` and `position`), "unreadable", "num_values" (with
`limit`), "part", "num_entries", "num_chars" and "num_tokens" (with `length`); the last four have a
`field` too, and "num_values" where one field is at fault."""


def find_problem(
    descriptor: int,
    size: int,
    max_chars: int,
    max_tokens: int,
    prompt_fields: Sequence[str] = PROMPT_FIELDS,
) -> Problem | None:
    """Look through a body in a file.

    Args:
        descriptor: of the file, which begins with the body.
        size: of the body in bytes.
        max_chars: that a text may have to fit the model.
        max_tokens: that a list of token ids may have.
        prompt_fields: where such lists are.

    Returns:
        None for a body that rank 0 may parse and check itself.
    """
    body = os.pread(descriptor, size, 0)
    while len(body) < size:
        more = os.pread(descriptor, size - len(body), len(body))
        if not more:
            return {"problem": "unreadable"}
        body += more
    # Every value but the outermost has one of these before it; in texts they hardly ever abound.
    if sum(map(body.count, b",[{")) > MAX_JSON_VALUES:
        return {"problem": "num_values", "limit": MAX_JSON_VALUES}
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        return {"problem": "json", "reason": error.msg, "position": error.pos}
    except (ValueError, RecursionError):  # no UTF-8, numbers of too many digits; too deep
        return {"problem": "unreadable"}
    del body
    if not isinstance(value, dict):
        return None
    num_values = 0
    for field, content in value.items():
        limits = Limits(max_chars, max_tokens if field in prompt_fields else None)
        found, count = _look_through({field: content}, limits)
        if found is None and field not in prompt_fields:
            num_values += count
            if num_values > MAX_OTHER_VALUES:
                found = {"problem": "num_values", "limit": MAX_OTHER_VALUES}
        if found is not None:
            return found | {"field": field[:MAX_NAME_LEN]}
    return None


def _look_through(content: Any, limits: Limits) -> tuple[Problem | None, int]:
    """What is wrong with a value, and how many values it holds, itself included."""
    count = 1
    stack = [("", content)]
    while stack:
        key, value = stack.pop()
        text = value if isinstance(value, str) and len(value) > len(key) else key
        if len(text) > limits.max_chars:
            if key in FOREIGN_KEYS:
                return {"problem": "part"}, count
            return {"problem": "num_chars", "length": len(text)}, count
        if not isinstance(value, list | dict):
            continue
        count += len(value)
        if limits.max_tokens is None:
            if len(value) > MAX_ENTRIES:
                return {"problem": "num_entries", "length": len(value)}, count
        elif len(value) > limits.max_tokens and isinstance(next(iter(value)), int):
            return {"problem": "num_tokens", "length": len(value)}, count
        if isinstance(value, dict):
            stack.extend(
                (name, one)
                for name, one in value.items()
                if isinstance(one, list | dict | str) or len(name) > limits.max_chars
            )
        else:
            stack.extend(("", one) for one in value if isinstance(one, list | dict | str))
    return None, count

"""What is wrong with a large body, found before rank 0 parses it. Runs in a worker of `sandbox`.

To parse megabytes of JSON is a single call of the standard library, which keeps the interpreter to
itself: on rank 0 every stream would wait for it.
"""

from __future__ import annotations

import json
import os
from typing import Any

MAX_JSON_VALUES = 1_000_000
"""In one body: on rank 0, parsing that many takes about 0.1 s, in which nobody else is served."""

MAX_OTHER_VALUES = 2**17
"""In one body, prompts and tokens aside."""

PROMPT_FIELDS = frozenset({"prompt", "tokens"})
"""Fields that hold token ids by the thousand."""

FOREIGN_KEYS = frozenset({"url", "data", "file_data"})
"""Of parts of messages that are images, sounds and files."""

MAX_NAME_LEN = 200

Problem = dict[str, Any]
"""`problem` is one of "json" (with `reason` and `position`), "unreadable", "num_values" (with
`limit`), "part", "num_chars" and "num_tokens" (with `length`); the last three and some
"num_values" have the `field` too."""


def find_problem(descriptor: int, size: int, max_chars: int, max_tokens: int) -> Problem | None:
    """Look through a body in a file.

    Args:
        descriptor: of the file, which begins with the body.
        size: of the body in bytes.
        max_chars: that a text may have to fit the model.
        max_tokens: that a list of token ids may have.

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
        is_prompt = field in PROMPT_FIELDS
        max_ids = max_tokens if is_prompt else MAX_JSON_VALUES
        found, count = _look_through({field: content}, max_chars, max_ids)
        if found is None and not is_prompt:
            num_values += count
            if num_values > MAX_OTHER_VALUES:
                found = {"problem": "num_values", "limit": MAX_OTHER_VALUES}
        if found is not None:
            return found | {"field": field[:MAX_NAME_LEN]}
    return None


def _look_through(content: Any, max_chars: int, max_ids: int) -> tuple[Problem | None, int]:
    """What is wrong with a value, and how many values it holds, itself included."""
    count = 0
    stack = [("", content)]
    while stack:
        key, value = stack.pop()
        count += 1
        text = value if isinstance(value, str) and len(value) > len(key) else key
        if len(text) > max_chars:
            if key in FOREIGN_KEYS:
                return {"problem": "part"}, count
            return {"problem": "num_chars", "length": len(text)}, count
        if isinstance(value, dict):
            stack.extend(value.items())
        elif isinstance(value, list):
            if len(value) > max_ids and isinstance(value[0], int):
                return {"problem": "num_tokens", "length": len(value)}, count
            stack.extend(("", one) for one in value)
    return None, count

"""Tells which structured outputs are known to be little work, whoever sent them. Rank 0 only.

They are compiled at once; all others are tried in another process first (`sandbox`). Known are JSON
schemas as programs write them from their types: objects, lists, texts, numbers, enumerations,
alternatives, and definitions that refer to each other a few times.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from autotp_serving.structured_output import StructuredOutput

MAX_LEN = 2**14
MAX_NODES = 256
MAX_DEPTH = 12
MAX_REFS = 32
MAX_ALTERNATIVES = 8
MAX_TEXTS = 256
MAX_COUNT = 64
MAX_NUMBER = 10**6

LABELS = {"title", "description", "default", "examples", "$schema", "$id", "$comment"}
TYPES = {"string", "number", "integer", "boolean", "null", "object", "array"}
FORMATS = {"date-time", "date", "time", "uuid"}
COUNTS = {"minLength", "maxLength", "minItems", "maxItems"}
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}


class _NotSimpleError(Exception):
    """The schema has something that is not known to be little work."""


def is_simple(structured_output: StructuredOutput) -> bool:
    """True if compiling it and following a completion are known to be little work."""
    schemas = (
        [tool.schema for tool in structured_output.calls.tools] if structured_output.calls else []
    )
    if structured_output.kind == "json_schema":
        schemas.append(structured_output.source)
    elif structured_output.kind not in ("text", "json_object", "choice"):
        return False
    if len(structured_output.source) + sum(map(len, schemas)) > MAX_LEN:
        return False
    try:
        if structured_output.kind == "choice":
            return len(json.loads(structured_output.source)) <= MAX_TEXTS
        counter = _Counter()
        for schema in schemas:
            counter.check(json.loads(schema))
    except (_NotSimpleError, ValueError, RecursionError):
        return False
    return True


class _Counter:
    """Adds up what several schemas hold."""

    def __init__(self) -> None:
        self._num_nodes = 0
        self._num_refs = 0

    def check(self, schema: Any, depth: int = 0) -> None:
        """Raise _NotSimpleError where a schema is not known to be little work."""
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES or depth > MAX_DEPTH:
            raise _NotSimpleError
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise _NotSimpleError
        for key, value in schema.items():
            self._check_keyword(key, value, depth)
        # What stands beside alternatives is merged into each of them.
        if schema.keys() & {"anyOf", "$ref"} and schema.keys() - LABELS - {
            *("anyOf", "$ref", "$defs", "definitions")
        }:
            raise _NotSimpleError
        if "anyOf" in schema and "$ref" in schema:
            raise _NotSimpleError

    def _check_keyword(self, key: str, value: Any, depth: int) -> None:
        if key in LABELS:
            return
        if key in ("properties", "$defs", "definitions") and isinstance(value, dict):
            self._check_all(value.values(), depth)
        elif key == "anyOf" and isinstance(value, list) and len(value) <= MAX_ALTERNATIVES:
            self._check_all(value, depth)
        elif key in ("items", "additionalProperties"):
            self.check(value, depth + 1)
        elif key == "$ref":
            self._num_refs += 1
            if self._num_refs > MAX_REFS:
                raise _NotSimpleError
        elif not _is_plain_keyword(key, value):
            raise _NotSimpleError

    def _check_all(self, schemas: Iterable[Any], depth: int) -> None:
        for schema in schemas:
            self.check(schema, depth + 1)


def _is_plain_keyword(key: str, value: Any) -> bool:
    """True for a keyword without schemas in it, if its value is small."""
    if key == "type":
        return isinstance(value, str) and value in TYPES
    if key in ("enum", "required"):
        return isinstance(value, list) and len(value) <= MAX_TEXTS and all(map(_is_small, value))
    if key == "const":
        return _is_small(value)
    if key == "format":
        return value in FORMATS
    if key in COUNTS:
        return type(value) is int and 0 <= value <= MAX_COUNT
    if key in BOUNDS:
        return type(value) is int and abs(value) <= MAX_NUMBER
    return False


def _is_small(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int)

"""JSON schemas as people mean them: objects have the properties that are named. Rank 0 and helpers.

By the letter of JSON Schema an object may have any others too, which a model that is held to the
schema would go on inventing. Here it may only where the schema says so.
"""

from __future__ import annotations

from typing import Any

OPENNESS = frozenset({"additionalProperties", "unevaluatedProperties", "minProperties"})
"""Keywords by which a schema says itself whether there may be others."""

MAPS = ("properties", "patternProperties", "$defs", "definitions")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLES = ("items", "additionalProperties")
MERGED = frozenset({"anyOf", "oneOf", "allOf", "$ref", "if", "dependentSchemas"})
"""What stands beside one of these adds to its properties."""


def close_objects(schema: Any) -> Any:
    """The schema with `additionalProperties: false` wherever properties are named.

    Left as it is where properties of one object come from several places. Raises RecursionError for
    a schema that is nested too deep.
    """
    return _close(schema) if _is_plain(schema) else schema


def _children(schema: dict[str, Any]) -> list[Any]:
    children: list[Any] = []
    for key in MAPS:
        if isinstance(schema.get(key), dict):
            children += schema[key].values()
    for key in LISTS:
        if isinstance(schema.get(key), list):
            children += schema[key]
    return children + [schema[key] for key in SINGLES if key in schema]


def _is_plain(schema: Any) -> bool:
    """True if no object is put together from several schemas."""
    if not isinstance(schema, dict):
        return True
    parts = schema.get("allOf")
    is_joined = isinstance(parts, list) and len(parts) > 1
    if is_joined or ("properties" in schema and not MERGED.isdisjoint(schema)):
        return False
    return all(map(_is_plain, _children(schema)))


def _close(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in MAPS and isinstance(value, dict):
            closed[key] = {name: _close(one) for name, one in value.items()}
        elif key in LISTS and isinstance(value, list):
            closed[key] = [_close(one) for one in value]
        else:
            closed[key] = _close(value) if key in SINGLES else value
    named = schema.get("properties")
    if isinstance(named, dict) and OPENNESS.isdisjoint(schema):
        required = schema.get("required")
        wanted = required if isinstance(required, list) else ()
        # One that has to be there and is not named is one of the others.
        if all(isinstance(name, str) and name in named for name in wanted):
            closed["additionalProperties"] = False
    return closed

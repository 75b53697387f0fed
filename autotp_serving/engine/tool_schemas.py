"""What the schema of a tool's parameters says of one of them. Rank 0 and its helper processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MAX_REFS = 16
MAX_SCHEMA_PARTS = 256

ALL_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})


@dataclass(frozen=True)
class SchemaTypes:
    """JSON types that a value may have.

    Attributes:
        names: of the types.
    """

    names: frozenset[str]

    @property
    def is_text(self) -> bool:
        """True for a value that is a text whatever it looks like."""
        return self.names == {"string"}


TEXT = SchemaTypes(frozenset({"string"}))


def find_types(schema: Mapping[str, Any] | None, key: str) -> SchemaTypes:
    """The types of a parameter: a text where the schema tells none."""
    properties = schema.get("properties") if schema is not None else None
    one = properties.get(key) if isinstance(properties, Mapping) else None
    names = frozenset(_list_types(one, schema)) & ALL_TYPES
    return SchemaTypes(names) if names else TEXT


def follow_ref(schema: Any, root: Mapping[str, Any] | None) -> Any:
    """What a schema's reference into its own root points at; a schema without one as it is."""
    for _ in range(MAX_REFS):
        ref = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(ref, str) or not ref.startswith("#/"):
            return schema
        schema = root
        for part in ref[2:].split("/"):
            schema = schema.get(part) if isinstance(schema, Mapping) else None
    return None


def _list_types(schema: Any, root: Mapping[str, Any] | None) -> Iterator[str]:
    """Types that a schema and its alternatives name, as far as they are few."""
    waiting = [schema]
    for _ in range(MAX_SCHEMA_PARTS):
        if not waiting:
            return
        one = follow_ref(waiting.pop(), root)
        if not isinstance(one, Mapping):
            continue
        kinds = one.get("type")
        if isinstance(kinds, str | list):
            yield from [kinds] if isinstance(kinds, str) else filter(_is_text, kinds)
            continue
        for word in ("anyOf", "oneOf", "allOf"):
            parts = one.get(word)
            waiting += parts if isinstance(parts, list) else ()
        values = one.get("enum", [one["const"]] if "const" in one else [])
        yield from map(type_of, values if isinstance(values, list) else ())
        if "properties" in one:
            yield "object"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def type_of(value: Any) -> str:
    """The JSON type of a value."""
    if isinstance(value, bool):
        return "boolean"
    for kind, name in ((str, "string"), (int, "integer"), (float, "number"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "object"

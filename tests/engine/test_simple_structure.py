"""Structured outputs that are compiled at once, and those that are tried elsewhere first."""

from __future__ import annotations

import json
from typing import Any

import pytest

from autotp_serving.engine.simple_structure import is_simple
from autotp_serving.structured_output import CallableTool, StructuredOutput, ToolCalls

PERSON = {
    "$defs": {"Pet": {"type": "object", "properties": {"name": {"type": "string"}}}},
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None},
        "pets": {"type": "array", "items": {"$ref": "#/$defs/Pet"}, "maxItems": 4},
        "kind": {"enum": ["a", "b", 3, None]},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHAIN = {
    "$defs": {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(40)} | {"d40": {}},
    "$ref": "#/$defs/d0",
}


def deep(levels: int) -> dict[str, Any]:
    return {"items": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize("schema", [PERSON, True, {}, {"const": "x"}, deep(8)])
def test_schemas_as_programs_write_them(schema: Any) -> None:
    source = json.dumps(schema)
    assert is_simple(StructuredOutput("json_schema", source))
    calls = ToolCalls("hermes", (CallableTool("f", source, is_strict=True),))
    assert is_simple(StructuredOutput("text", calls=calls))


@pytest.mark.parametrize(
    "schema",
    [
        CHAIN,
        deep(20),
        {"properties": {f"p{number}": {} for number in range(300)}},
        {"anyOf": [{"type": "string"}] * 9},
        {"anyOf": [{"properties": {"a": {}}}], "properties": {"b": {}}},
        {"allOf": [{}]},
        {"oneOf": [{}]},
        {"type": "integer", "multipleOf": 62615533},
        {"type": "string", "pattern": "(a*)*"},
        {"type": "string", "maxLength": 10**6},
        {"type": "integer", "maximum": 10**30},
        {"type": "number", "minimum": 0.1},
        {"enum": [[1]]},
        {"enum": [str(number) for number in range(300)]},
        {"patternProperties": {"a": {}}},
        {"x-guidance": {"lenient": True}},
        [1],
        "a",
    ],
)
def test_anything_else_is_not_simple(schema: Any) -> None:
    assert not is_simple(StructuredOutput("json_schema", json.dumps(schema)))


@pytest.mark.parametrize(
    ("kind", "source", "expected"),
    [
        ("json_object", "", True),
        ("choice", '["a", "b"]', True),
        ("choice", json.dumps(["a"] * 300), False),
        ("regex", "a", False),
        ("grammar", 'start: "a"', False),
        ("json_schema", "{", False),
        ("json_schema", "[" * 10_000, False),
        ("json_schema", json.dumps({"title": "a" * 20_000}), False),
    ],
)
def test_other_kinds(kind: str, source: str, expected: bool) -> None:
    assert is_simple(StructuredOutput(kind, source)) is expected

"""JSON schemas drawn at random, and a check of values against them."""

from __future__ import annotations

import random
from typing import Any


def make_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of nested objects, arrays and plain values, all of bounded size."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    kind = rng.choice(kinds if depth > 2 else [*kinds, "object", "object", "array", "anyOf"])
    if kind == "object":
        names = rng.sample(["id", "name", "é", 'a "b"', "x_y", "list", "n"], rng.randint(1, 5))
        return {
            "type": "object",
            "properties": {name: make_schema(rng, depth + 1) for name in names},
            "required": rng.sample(names, rng.randint(0, len(names))),
            "additionalProperties": False,
        }
    if kind == "array":
        least = rng.randint(0, 2)
        size = {"minItems": least, "maxItems": least + rng.randint(0, 3)}
        return {"type": "array", "items": make_schema(rng, depth + 1)} | size
    if kind == "anyOf":
        return {"anyOf": [make_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    return {
        "string": {"type": "string", "minLength": 1, "maxLength": rng.randint(2, 30)},
        "integer": {"type": "integer", "minimum": -5, "maximum": rng.randint(0, 5000)},
        "number": {"type": "number", "minimum": -1.5, "maximum": 100},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": ["a", 1, None, "\N{GRINNING FACE}", {"k": [1]}]},
        "const": {"const": rng.choice(["x", 7, True])},
        "pattern": {"type": "string", "pattern": "^[a-z]{1,5}-[0-9]{2}$"},
    }[kind]


def check(schema: dict[str, Any], value: Any) -> None:
    """Just enough of JSON Schema for what `make_schema` makes."""
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            try:
                return check(option, value)
            except AssertionError:
                continue
        raise AssertionError(f"{value!r} is none of {schema}")
    if "enum" in schema:
        assert any(type(one) is type(value) and one == value for one in schema["enum"])
        return None
    if "const" in schema:
        assert type(value) is type(schema["const"]) and value == schema["const"]
        return None
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool,
             "null": type(None), "object": dict, "array": list}  # fmt: skip
    assert isinstance(value, kinds[schema["type"]])
    if schema["type"] in ("integer", "number"):
        assert not isinstance(value, bool) and schema["minimum"] <= value <= schema["maximum"]
    if "maxLength" in schema:
        assert schema.get("minLength", 0) <= len(value) <= schema["maxLength"]
    if schema["type"] == "array":
        assert schema.get("minItems", 0) <= len(value) <= schema["maxItems"]
        for item in value:
            check(schema["items"], item)
    if schema["type"] == "object":
        assert set(schema.get("required", ())) <= set(value) <= set(schema["properties"])
        for name, item in value.items():
            check(schema["properties"][name], item)
    return None

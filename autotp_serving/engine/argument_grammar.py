"""Grammars of arguments that are not written in JSON: pairs between tags, and Gemma's notation.

For tool calls that are held to a form, in llguidance's Lark. Rank 0 and its helper processes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from autotp_serving.engine.json_schema import close_objects
from autotp_serving.engine.tool_formats import ToolSyntax
from autotp_serving.engine.tool_schemas import find_types, follow_ref, type_of

MAX_DEPTH = 12
MAX_RULES = 2000
MAX_TEXT_LEN = 2048
"""Longer limits of a text are left out of account, as they cost a state for each character."""

FREE = r"/(.|\n)*/"
SCALAR = r'/-?(0|[1-9][0-9]*)(\.[0-9]+)?/ | "true" | "false" | "null"'
LABELS = ("$defs", "definitions")
LIMITS_OF_TEXTS = ("pattern", "format", "minLength")


class ArgumentRules:
    """Rules of one tool's arguments; `arguments_N` begins them.

    Args:
        syntax: of the format.
        number: the tool's.
        schema: of its parameters, closed.
        guidance: llguidance's settings for what is JSON in them.
        is_strict: refuse what cannot be held to; otherwise it is left out of account.

    Raises:
        ValueError: naming it.
    """

    def __init__(
        self,
        syntax: ToolSyntax,
        number: int,
        schema: dict[str, Any],
        guidance: dict[str, Any],
        *,
        is_strict: bool,
    ) -> None:
        self.rules: list[str] = []
        self.grammars: list[dict[str, Any]] = []
        self._syntax = syntax
        self._root = schema
        self._guidance = guidance
        self._is_strict = is_strict
        self._has_anything = False
        self._prefix = f"arguments_{number}"
        body = self._pairs(schema) if syntax.kind == "pairs" else self._value(schema, MAX_DEPTH)
        self.rules.append(f"{self._prefix}: {body}")

    def _add(self, body: str, *, is_lazy: bool = False) -> str:
        """A rule of its own; returns its name."""
        if len(self.rules) >= MAX_RULES:
            raise ValueError("the parameters are too many to be held to in this model's format")
        name = f"{self._prefix}_{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if is_lazy else ''}: {body}")
        return name

    def _json(self, schema: Any) -> str:
        """A value in JSON; returns the name by which Lark refers to it."""
        name = f"{self._prefix}_json_{len(self.grammars)}"
        shared = {word: self._root[word] for word in LABELS if word in self._root}
        whole = shared | (schema if isinstance(schema, dict) else {})
        self.grammars.append(
            {"name": name, "json_schema": close_objects(whole) | {"x-guidance": self._guidance}}
        )
        return f"@{name}"

    def _text(self, schema: Any, close: str, edge: str = "") -> str:
        """A text up to the mark that ends it; `edge` may come before that and is no part of it."""
        limits = schema if isinstance(schema, Mapping) else {}
        if self._is_strict:
            unheld = next((word for word in LIMITS_OF_TEXTS if word in limits), None)
            if unheld is not None:
                raise ValueError(f"'{unheld}' of a text cannot be held to in this model's format")
        most = limits.get("maxLength")
        free = FREE
        if isinstance(most, int) and 0 <= most <= MAX_TEXT_LEN:
            free, close = rf"/(.|\n){{0,{most}}}/", edge + close
        return self._add(f"{free} {_literal(close)}", is_lazy=True)

    def _pairs(self, schema: Mapping[str, Any]) -> str:
        before_key, _, rest = self._syntax.pair.partition("{key}")
        before_value, _, after_value = rest.partition("{value}")
        close = after_value.strip()
        edge, _, blank = after_value.partition(close)
        properties, required = _read_object(schema)
        pairs = []
        for key, one in properties.items():
            types = find_types(schema, key).names
            one = follow_ref(one, self._root)
            texts = _list_texts(one)
            if "string" not in types:
                value = f"{self._json(one)} {_literal(after_value)}"
            elif texts is not None:
                choices = " | ".join(_literal(text) for text in texts)
                value = f"({choices}) {_literal(after_value)}"
            else:
                value = f"{self._text(one, close, edge)} {_literal(blank)}"
            head = _literal(before_key + key + before_value)
            pair = self._add(f"{head} {value}")
            pairs.append(pair if key in required else f"{pair}?")
        if _is_open(schema):
            head = f'{_literal(before_key)} /[^<>\\n"]{{1,64}}/ {_literal(before_value)}'
            pairs.append(f"({head} {self._text(None, close)} {_literal(blank)})*")
        return " ".join(pairs) or '""'

    def _value(self, schema: Any, depth: int) -> str:
        """Any value in Gemma's notation."""
        schema = follow_ref(schema, self._root)
        schema = schema if isinstance(schema, Mapping) else {}
        if depth == 0:
            raise ValueError("the parameters are nested too deep for this model's format")
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list) and values:
            return "(" + " | ".join(_literal(self._write(value)) for value in values) + ")"
        parts = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(parts, list):
            return "(" + " | ".join(self._value(part, depth - 1) for part in parts) + ")"
        kinds = schema.get("type", "object" if "properties" in schema else None)
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return "(" + " | ".join(self._of_type(kind, schema, depth) for kind in kinds) + ")"

    def _of_type(self, kind: Any, schema: Mapping[str, Any], depth: int) -> str:
        if kind == "string":
            quote = self._syntax.quote
            return f"{_literal(quote)} {self._text(schema, quote)}"
        if kind == "object" and not ("properties" not in schema and _is_open(schema)):
            return self._object(schema, depth)
        if kind == "array" and "items" in schema:
            item = self._add(self._value(schema["items"], depth - 1))
            least, most = _count(schema, "minItems") or 0, _count(schema, "maxItems")
            if most == 0:
                return '"[]"'
            times = f"{{{max(0, least - 1)},{'' if most is None else most - 1}}}"
            some = f'"[" {item} ("," {item}){times} "]"'
            return some if least else f'"[]" | {some}'
        if kind in ("object", "array", None):
            return f"{self._anything()}_{kind or 'value'}"
        return self._json({**schema, "type": kind})

    def _anything(self) -> str:
        """Rules of what no schema holds; returns what their names begin with."""
        name = f"{self._prefix}_any"
        if not self._has_anything:
            self._has_anything = True
            quote = _literal(self._syntax.quote)
            pair = f'/[A-Za-z_][A-Za-z0-9_.-]*/ ":" {name}_value'
            self.rules += [
                f"{name}_value: {name}_object | {name}_array | {quote} {name}_text | {SCALAR}",
                f'{name}_object: "{{" ({pair} ("," {pair})*)? "}}"',
                f'{name}_array: "[" ({name}_value ("," {name}_value)*)? "]"',
                f"{name}_text[lazy]: {FREE} {quote}",
            ]
        return name

    def _object(self, schema: Mapping[str, Any], depth: int) -> str:
        """Properties in their order; a comma stands before each but the first."""
        properties, required = _read_object(schema)
        first = after = '""'
        for key, one in reversed(properties.items()):
            value = self._value(one, depth - 1)
            pair = self._add(f"{_literal(key + ':')} {value}")
            is_required = key in required
            first = self._add(f"{pair} {after}" if is_required else f"{pair} {after} | {first}")
            after = self._add(f'"," {pair} {after}' if is_required else f'("," {pair})? {after}')
        return f'"{{" {first} "}}"'

    def _write(self, value: Any) -> str:
        """A value as Gemma writes it."""
        kind = type_of(value)
        if kind == "string":
            return f"{self._syntax.quote}{value}{self._syntax.quote}"
        if kind == "array":
            return f"[{','.join(map(self._write, value))}]"
        if kind == "object":
            return "{" + ",".join(f"{key}:{self._write(one)}" for key, one in value.items()) + "}"
        return json.dumps(value)


def _read_object(schema: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Properties by name, and names of those that have to be there."""
    properties, required = schema.get("properties"), schema.get("required")
    named = dict(properties) if isinstance(properties, Mapping) else {}
    wanted = [name for name in required if isinstance(name, str)] if isinstance(
        required, list
    ) else []  # fmt: skip
    return named | {name: {} for name in wanted if name not in named}, set(wanted)


def _is_open(schema: Mapping[str, Any]) -> bool:
    """True where an object may have properties that are not named."""
    return bool(schema.get("additionalProperties", "properties" not in schema))


def _count(schema: Mapping[str, Any], word: str) -> int | None:
    value = schema.get(word)
    return value if isinstance(value, int) and value >= 0 else None


def _list_texts(schema: Any) -> list[str] | None:
    """The texts of which a value is one; None where it may be another."""
    if not isinstance(schema, Mapping):
        return None
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return values or None
    return None


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

"""A call's arguments, in the ways in which models write them, as JSON while they come. Rank 0 only.

Each reader takes pieces of text from where arguments begin and gives JSON, the same however the
text is cut.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

from autotp_serving.api.openai.reasoning import overlap_len
from autotp_serving.engine.tool_formats import ToolSyntax
from autotp_serving.engine.tool_schemas import SchemaTypes, find_types

MAX_KEY_LEN = 256
MAX_LITERAL_LEN = 4096
"""Of what may be a value in Python's notation."""

JSON_TYPES: dict[type, str] = {
    dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number",
    type(None): "null",
}  # fmt: skip
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
STRUCTURE = "{}[]:,"


class ArgumentReader(Protocol):
    """Reads one call's arguments."""

    def add(self, text: str) -> tuple[str, str | None]:
        """Take a piece; return the JSON that is certain and, once all is there, what follows."""
        ...

    def end(self) -> str:
        """The JSON of what was held back: the text is over."""
        ...


class BracketCounter:
    """Tells where a JSON value in brackets ends.

    Attributes:
        depth: brackets that are open.
        in_string: whether a text is.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._is_escaped = False

    def add(self, char: str) -> None:
        """Take the next character."""
        if self.in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self.in_string = False
        elif char == '"':
            self.in_string = True
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1


class JsonReader:
    """See ArgumentReader. An object in JSON: goes out as it comes."""

    def __init__(self) -> None:
        self._brackets = BracketCounter()

    def add(self, text: str) -> tuple[str, str | None]:
        """See ArgumentReader."""
        for position, char in enumerate(text, start=1):
            self._brackets.add(char)
            if self._brackets.depth == 0:
                return text[:position], text[position:]
        return text, None

    def end(self) -> str:
        """See ArgumentReader."""
        return ""


class PairReader:
    """See ArgumentReader. Keys and values between tags; the tool's schema tells what a value is.

    Texts go out as they come, other values once they are whole. What is no pair ends the call.

    Args:
        syntax: of the format.
        schema: of the tool's parameters; None where it tells nothing.
    """

    def __init__(self, syntax: ToolSyntax, schema: Mapping[str, Any] | None) -> None:
        before_key, _, rest = syntax.pair.partition("{key}")
        before_value, _, after_value = rest.partition("{value}")
        self._key_open = before_key
        self._end_tag = syntax.after.split()[0]
        self._close = after_value.strip()
        self._edge = "\n" if after_value.startswith("\n") else ""
        tags = r"\s*".join(map(re.escape, before_value.split()))
        self._key = re.compile(
            rf"{re.escape(before_key)}\s*([^<>\n\"]{{1,{MAX_KEY_LEN}}}?)\s*{tags}"
        )
        self._schema = schema
        self._text = ""
        self._types: SchemaTypes | None = None  # of the value that is being read
        self._is_first_piece = False
        self._has_begun = False
        self._has_pairs = False

    def add(self, text: str) -> tuple[str, str | None]:
        """See ArgumentReader."""
        self._text += text
        out = ""
        if not self._has_begun:
            self._has_begun, out = True, "{"
        while True:
            if self._types is None:
                found, rest = self._read_key()
            else:
                found, rest = self._read_value()
            out += found
            if rest is not None:
                return f"{out}}}", rest
            if not found:
                return out, None

    def end(self) -> str:
        """See ArgumentReader."""
        if self._types is None:
            return "}"
        if self._types.is_text:
            return _escape(self._text)
        return self._text.strip()

    def _read_key(self) -> tuple[str, str | None]:
        """The JSON up to the next value; the rest of the text once there is none."""
        text = self._text = self._text.lstrip()
        if match := self._key.match(text[: 2 * MAX_KEY_LEN]):
            self._text = text[match.end() :]
            self._types = find_types(self._schema, match[1])
            self._is_first_piece = bool(self._edge)
            out = f"{', ' if self._has_pairs else ''}{json.dumps(match[1], ensure_ascii=False)}: "
            self._has_pairs = True
            return out + ('"' if self._types.is_text else ""), None
        if text.startswith(self._end_tag):
            return "", text[len(self._end_tag) :]
        is_key = text.startswith(self._key_open) and len(text) < 2 * MAX_KEY_LEN
        if is_key or any(one.startswith(text) for one in (self._key_open, self._end_tag)):
            return "", None
        return "", text

    def _read_value(self) -> tuple[str, None]:
        """The JSON of what is certain of the value."""
        assert self._types is not None, "no key was read"
        if self._is_first_piece and self._text:
            self._text = self._text.removeprefix(self._edge)
            self._is_first_piece = False
        value, close, rest = self._text.partition(self._close)
        if close:
            self._text = rest
            value = value.removesuffix(self._edge)
            types, self._types = self._types, None
            return (f'{_escape(value)}"' if types.is_text else to_json(value, types)), None
        if not self._types.is_text:
            return "", None
        certain_len = len(value) - overlap_len(value, self._close)
        certain = value[:certain_len].removesuffix(self._edge)
        self._text = value[len(certain) :]
        return _escape(certain), None


class GemmaReader:
    """See ArgumentReader. Gemma's notation: keys without quotes, texts between marks of its own.

    Args:
        quote: the mark.
    """

    def __init__(self, quote: str) -> None:
        self._quote = quote
        self._text = ""
        self._word = ""
        self._depth = 0
        self._in_string = False

    def add(self, text: str) -> tuple[str, str | None]:
        """See ArgumentReader."""
        text, self._text = self._text + text, ""
        out: list[str] = []
        while text:
            before, quote, rest = text.partition(self._quote)
            if not quote:
                held_len = overlap_len(text, self._quote)
                before, self._text = text[: len(text) - held_len], text[len(text) - held_len :]
            if self._in_string:
                out.append(_escape(before))
            else:
                length = self._read_structure(before, out)
                if length is not None:
                    self._text = ""
                    return "".join(out), text[length:]
            if quote:
                out.append('"')
                self._in_string = not self._in_string
            text = rest
        return "".join(out), None

    def end(self) -> str:
        """See ArgumentReader."""
        return _escape(self._text) if self._in_string else self._word

    def _read_structure(self, text: str, out: list[str]) -> int | None:
        """Read what stands outside of texts; the length of it that belongs to the arguments."""
        for position, char in enumerate(text, start=1):
            if char not in STRUCTURE:
                self._word += char
                continue
            word, self._word = self._word.strip(), ""
            if word:
                is_value = word in ("true", "false", "null") or NUMBER.fullmatch(word)
                out.append(word if is_value and char != ":" else f'"{_escape(word)}"')
            out.append(f"{char} " if char in ":," else char)
            self._depth += (char in "{[") - (char in "}]")
            if self._depth == 0:
                return position
        return None


def to_json(text: str, types: SchemaTypes) -> str:
    """A value as JSON, of a type that the schema allows if it can be read so; else as a text."""
    plain = text.strip()
    for read in (_read_json, _read_python):
        value = read(plain)
        if value is None and plain.lower() not in ("null", "none"):
            continue
        kind = JSON_TYPES.get(type(value), "")
        if kind == "string":  # quotes are part of it
            break
        if kind == "number" and "number" not in types.names and value.is_integer():
            kind, value = "integer", int(value)
        if kind in types.names or (kind == "integer" and "number" in types.names):
            try:
                return json.dumps(value, ensure_ascii=False, allow_nan=False)
            except (TypeError, ValueError, RecursionError):
                break
    return json.dumps(text, ensure_ascii=False)


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_python(text: str) -> Any:
    """A value in Python's notation, as some models write it; `true` in any case."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if len(text) > MAX_LITERAL_LEN:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would show the text
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _escape(text: str) -> str:
    """A text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]

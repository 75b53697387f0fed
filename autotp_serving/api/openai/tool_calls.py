"""Finds the tool calls in a model's text while it comes, in two formats. Rank 0 only.

hermes (also Qwen): `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` anywhere in a text;
llama3: a text that is nothing but `{"name": ..., "parameters": {...}}`, several parted by `;`.
What looks like a call and is none stays text, so that nothing a model said is lost.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection
from typing import Any

from autotp_serving.api.openai.reasoning import split_certain
from autotp_serving.structured_output import ToolFormat

Delta = dict[str, Any]

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')


def find_format(chat_template: str) -> ToolFormat | None:
    """The format that a chat template teaches."""
    if OPEN in chat_template:
        return "hermes"
    if PYTHON_TAG in chat_template or '"parameters": dictionary of argument name' in chat_template:
        return "llama3"
    return None


def content_delta(text: str) -> list[Delta]:
    """A delta of plain text, none for no text."""
    return [{"content": text}] if text else []


class CallReader:
    """Reads one call, a JSON object that comes in pieces; its arguments stream out as they come.

    Args:
        index: the call's number in the completion.
        names: of the tools that there are.
    """

    def __init__(self, index: int, names: Collection[str]) -> None:
        self.index = index
        self.raw = ""
        self.is_call = False
        self._names = names
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._in_arguments = False

    def add(self, text: str) -> tuple[list[Delta], str | None]:
        """Take a piece; return its deltas and, once the object is complete, what follows it."""
        deltas: list[Delta] = []
        arguments = ""
        for position, char in enumerate(text):
            if char == "{" and self._depth == 1 and not self._in_string and not self.is_call:
                match = HEAD.fullmatch(self.raw)
                if match and match[1] in self._names:
                    self.is_call = self._in_arguments = True
                    deltas.append(self._begin(match[1], ""))
            self.raw += char
            self._track(char)  # a text that does not begin with a brace is over at once
            if self._in_arguments:
                arguments += char
                self._in_arguments = self._depth > 1
            if self._depth == 0 and not self.raw.isspace():
                if arguments:
                    deltas.append(self._go_on(arguments))
                if not self.is_call:
                    deltas += self._read_whole()
                return deltas, text[position + 1 :]
        if arguments:
            deltas.append(self._go_on(arguments))
        return deltas, None

    def _track(self, char: str) -> None:
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif char == "\\":
                self._is_escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1

    def _read_whole(self) -> list[Delta]:
        """A call whose fields come in another order, or an object that is none."""
        try:
            call = json.loads(self.raw)
        except ValueError:
            return []
        if not isinstance(call, dict) or call.get("name") not in self._names:
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        self.is_call = True
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return [self._begin(call["name"], arguments)]

    def _begin(self, name: str, arguments: str) -> Delta:
        call = {
            "index": self.index,
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        return {"tool_calls": [call]}

    def _go_on(self, arguments: str) -> Delta:
        return {"tool_calls": [{"index": self.index, "function": {"arguments": arguments}}]}


class ToolCallParser:
    """Text in pieces in, deltas of text and of calls out.

    Args:
        tool_format: how the model writes calls.
        names: of the tools that there are.
        max_calls: further calls are dropped.
    """

    def __init__(
        self, tool_format: ToolFormat, names: Collection[str], max_calls: int | None = None
    ) -> None:
        self.num_calls = 0
        self._is_hermes = tool_format == "hermes"
        self._names = names
        self._max_calls = max_calls
        self._held = ""
        self._reader: CallReader | None = None
        # llama3: True while the text may be calls and nothing else.
        self._may_call = True

    def add(self, text: str) -> list[Delta]:
        """Take a piece, return what is certain by now."""
        text, self._held = self._held + text, ""
        deltas: list[Delta] = []
        while text:
            if self._reader is not None:
                found, rest = self._reader.add(text)
                deltas += self._keep(found)
                if rest is None:
                    return deltas
                deltas += self._finish_call()
                text = rest
                continue
            found, text = self._seek_hermes(text) if self._is_hermes else self._seek_llama3(text)
            deltas += found
        return deltas

    def end(self) -> list[Delta]:
        """What was held back: the text is over."""
        deltas: list[Delta] = []
        if self._reader is not None and not self._reader.is_call:
            deltas = content_delta((OPEN if self._is_hermes else "") + self._reader.raw)
        held = self._held
        if self.num_calls:  # a tag that was cut short is no text either
            held = held.rstrip()
            held = "" if OPEN.startswith(held) or CLOSE.startswith(held) else held
        deltas += content_delta(held)
        self._reader, self._held = None, ""
        return deltas

    def _seek_hermes(self, text: str) -> tuple[list[Delta], str]:
        """Text up to the next call; returns what is left to read."""
        if self.num_calls:  # between and after calls, blanks and closing tags mean nothing
            text = text.lstrip()
            if text.startswith(CLOSE):
                return [], text[len(CLOSE) :]
            if CLOSE.startswith(text):
                self._held = text
                return [], ""
        before, tag, rest = text.partition(OPEN)
        if tag:
            self._reader = CallReader(self.num_calls, self._names)
            return content_delta(before.rstrip()), rest
        certain, self._held = split_certain(text, OPEN)
        return content_delta(certain), ""

    def _seek_llama3(self, text: str) -> tuple[list[Delta], str]:
        if not self._may_call:
            return content_delta(text), ""
        start = text.lstrip(" \n\t;,") if self.num_calls else text.lstrip()
        if start.startswith(PYTHON_TAG):
            start = start[len(PYTHON_TAG) :].lstrip()
        elif start and PYTHON_TAG.startswith(start):
            self._held = text
            return [], ""
        if not start:
            self._held = text
            return [], ""
        if start.startswith("{"):
            self._reader = CallReader(self.num_calls, self._names)
            return [], start
        self._may_call = False
        return content_delta(text), ""

    def _finish_call(self) -> list[Delta]:
        """The object is complete: count it, or give it back as text."""
        reader, self._reader = self._reader, None
        assert reader is not None, "no call has begun"
        if reader.is_call:
            self.num_calls += 1
            return []
        self._may_call = False
        return content_delta((OPEN if self._is_hermes else "") + reader.raw)

    def _keep(self, deltas: list[Delta]) -> list[Delta]:
        return deltas if self._max_calls is None or self.num_calls < self._max_calls else []

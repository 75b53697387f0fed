"""Readers of one tool call while it comes, in any of the formats. Rank 0 only."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from autotp_serving.api.openai.argument_readers import (
    ArgumentReader,
    BracketCounter,
    GemmaReader,
    JsonReader,
    PairReader,
)
from autotp_serving.engine.tool_formats import ToolSyntax

Delta = dict[str, Any]
ToolParameters = Mapping[str, Mapping[str, Any] | None]
"""The tools that may be called, by name, and the JSON schemas of their parameters."""

HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')
MAX_HEAD_LEN = 512
NAME = r"(?P<name>[a-zA-Z0-9_.-]{1,128})"
INDEX = r"(?P<index>\d{1,6})"


def content_delta(text: str) -> list[Delta]:
    """A delta of plain text, none for no text."""
    return [{"content": text}] if text else []


def begin_call(index: int, name: str, arguments: str = "", call_id: str = "") -> Delta:
    """The first delta of a call."""
    call = {
        "index": index,
        "id": call_id or f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
    return {"tool_calls": [call]}


def continue_call(index: int, arguments: str) -> list[Delta]:
    """A further delta of a call, none for no text."""
    call = {"index": index, "function": {"arguments": arguments}}
    return [{"tool_calls": [call]}] if arguments else []


class CallReader(Protocol):
    """Reads one call.

    Attributes:
        is_call: known to be one.
    """

    is_call: bool

    def add(self, text: str) -> tuple[list[Delta], str | None]:
        """Take a piece; return its deltas and, once the call is over, what follows it."""
        ...

    def end(self) -> list[Delta]:
        """What was held back of a call: the text is over."""
        ...

    def give_back(self) -> tuple[str, str]:
        """Of what is no call: its text, and what of it must be read anew."""
        ...


class ObjectReader:
    """See CallReader. A call that is a JSON object; its arguments stream out as they come.

    Args:
        index: the call's number in the completion.
        tools: that there are.
        lead: what was read of it.
    """

    def __init__(self, index: int, tools: ToolParameters, lead: str) -> None:
        self.is_call = False
        self._index = index
        self._tools = tools
        self._lead = lead
        self._raw = ""
        self._brackets = BracketCounter()
        self._in_list = False
        self._in_arguments = False

    def add(self, text: str) -> tuple[list[Delta], str | None]:
        """See CallReader."""
        deltas: list[Delta] = []
        arguments = ""
        for position, char in enumerate(text, start=1):
            if char == "[" and not self._in_list and not self._raw.strip():
                self._in_list = True  # of calls
                self._lead, self._raw = self._lead + self._raw + char, ""
                continue
            brackets = self._brackets
            if char == "{" and brackets.depth == 1 and not brackets.in_string and not self.is_call:
                match = HEAD.fullmatch(self._raw)
                if match and match[1] in self._tools:
                    self.is_call = self._in_arguments = True
                    deltas.append(begin_call(self._index, match[1]))
            if not self.is_call:
                self._raw += char
            brackets.add(char)  # a text that does not begin with a brace is over at once
            if self._in_arguments:
                arguments += char
                self._in_arguments = brackets.depth > 1
            if brackets.depth <= 0 and not self._raw.isspace():
                deltas += continue_call(self._index, arguments)
                if not self.is_call:
                    deltas += self._read_whole()
                return deltas, text[position:]
        return deltas + continue_call(self._index, arguments), None

    def end(self) -> list[Delta]:
        """See CallReader."""
        return []

    def give_back(self) -> tuple[str, str]:
        """See CallReader."""
        return self._lead + self._raw, ""

    def _read_whole(self) -> list[Delta]:
        """A call whose fields come in another order, or an object that is none."""
        try:
            call = json.loads(self._raw)
        except (ValueError, RecursionError):
            return []
        if not isinstance(call, dict) or call.get("name") not in self._tools:
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        self.is_call = True
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return [begin_call(self._index, call["name"], arguments)]


class TaggedReader:
    """See CallReader. A call whose name stands between tags, and its arguments after it.

    Args:
        index: the call's number in the completion.
        tools: that there are.
        syntax: how it is written.
        head: of such a call, up to its arguments.
        lead: what was read of it.
        raw: what of that belongs to the head.
        ids: of the calls before it; its own is added, if it has one.
    """

    def __init__(
        self,
        index: int,
        tools: ToolParameters,
        syntax: ToolSyntax,
        head: re.Pattern[str],
        lead: str,
        raw: str,
        ids: set[str],
    ) -> None:
        self.is_call = False
        self._index = index
        self._tools = tools
        self._syntax = syntax
        self._head = head
        self._lead = lead
        self._num_lead_chars = len(raw)
        self._raw = raw
        self._ids = ids
        self._arguments: ArgumentReader | None = None

    def add(self, text: str) -> tuple[list[Delta], str | None]:
        """See CallReader."""
        deltas: list[Delta] = []
        if self._arguments is None:
            self._raw += text
            match = self._head.match(self._raw[:MAX_HEAD_LEN])
            if match is None and len(self._raw) < MAX_HEAD_LEN:
                return [], None
            if match is None or match["name"] not in self._tools:
                return [], ""
            name, index = match["name"], match.groupdict().get("index")
            self.is_call = True
            # Models that number their calls are told of the results by the same ids.
            call_id = "" if index is None else f"functions.{name}:{index}"
            if call_id in self._ids:
                call_id = ""
            self._ids.add(call_id)
            deltas.append(begin_call(self._index, name, call_id=call_id))
            self._arguments = make_argument_reader(self._syntax, self._tools[name])
            text = self._raw[match.end() :]
        arguments, rest = self._arguments.add(text)
        return deltas + continue_call(self._index, arguments), rest

    def end(self) -> list[Delta]:
        """See CallReader."""
        assert self._arguments is not None, "no call has begun"
        return continue_call(self._index, self._arguments.end())

    def give_back(self) -> tuple[str, str]:
        """See CallReader."""
        return self._lead, self._raw[self._num_lead_chars :]


def make_argument_reader(syntax: ToolSyntax, schema: Mapping[str, Any] | None) -> ArgumentReader:
    """A reader of one call's arguments."""
    if syntax.kind == "pairs":
        return PairReader(syntax, schema)
    return GemmaReader(syntax.quote) if syntax.kind == "gemma" else JsonReader()


def make_head(syntax: ToolSyntax) -> re.Pattern[str]:
    """What a call begins with after its opening tag; blanks there mean nothing."""
    text = f"{syntax.before_name.removeprefix(syntax.open)}{{name}}{syntax.between}"
    places = {"{name}": NAME, "{index}": INDEX}
    pattern = ""
    for part in re.split(r"(\{name\}|\{index\}|\s+)", text):
        pattern += r"\s*" if part.isspace() else places.get(part, re.escape(part))
    # Mistral's models write ids there, or nothing.
    pattern = pattern.replace(r"\[ARGS\]", r"(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?")
    pattern = pattern.replace(r"functions\.", r"(?:functions\.)?")
    follows = r"\{"
    if syntax.kind == "pairs":
        tags = (syntax.pair.partition("{key}")[0], syntax.after.split()[0])
        follows = "|".join(map(re.escape, tags))
    return re.compile(rf"\s*{pattern}\s*(?={follows})")

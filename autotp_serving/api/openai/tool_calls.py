"""Finds the tool calls in a model's text while it comes, in the format of its family. Rank 0 only.

`engine/tool_formats.py` holds the formats. What looks like a call and is none, or calls a tool that
was not offered, stays text, so that nothing a model said is lost.
"""

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
from autotp_serving.api.openai.reasoning import split_certain
from autotp_serving.engine.tool_formats import TAG, TOOL_SYNTAXES, ToolSyntax
from autotp_serving.structured_output import ToolFormat

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


class ToolCallParser:
    """Text in pieces in, deltas of text and of calls out.

    Args:
        tool_format: how the model writes calls.
        tools: that there are.
        max_calls: further calls are dropped.
    """

    def __init__(
        self, tool_format: ToolFormat, tools: ToolParameters, max_calls: int | None = None
    ) -> None:
        self.num_calls = 0
        syntax = self._syntax = TOOL_SYNTAXES[tool_format]
        self._tools = tools
        self._max_calls = max_calls
        self._held = ""
        self._ids: set[str] = set()
        self._reader: CallReader | None = None
        self._head = None if syntax.kind == "object" else make_head(syntax)
        self._opens = [one for one in (syntax.open, *syntax.other_opens) if one]
        inner = TAG.match(syntax.call.removeprefix(syntax.open).lstrip())
        begins = syntax.before_name.removeprefix(syntax.open).lstrip()
        if syntax.kind != "object" and begins.startswith("<"):
            self._kept = [inner[0] if inner else begins.split()[0]]
        else:
            self._kept = []
        fillers = f"{syntax.after} {syntax.separator} {syntax.end}"
        self._fillers = [*_split_tags(fillers), *syntax.fillers]
        # Between calls, or where only calls may begin.
        self._is_between = not syntax.open

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
                text = self._finish_call(rest, deltas)
            elif self._is_between:
                text = self._seek_next(text)
            else:
                text = self._seek(text, deltas)
        return deltas

    def end(self) -> list[Delta]:
        """What was held back: the text is over."""
        deltas: list[Delta] = []
        while self._reader is not None:
            if self._reader.is_call:
                deltas += self._keep(self._reader.end())
                self.num_calls += 1
                self._reader = None
                self._is_between = True
            else:
                deltas += self.add(self._finish_call("", deltas))
        held, self._held = self._held, ""
        if self.num_calls and self._is_between:  # a tag that was cut short is no text either
            held = ""
        return deltas + content_delta(held)

    def _seek(self, text: str, deltas: list[Delta]) -> str:
        """Pass text on up to the next call; returns what is left to read."""
        places = [(text.find(one), one) for one in (*self._opens, *self._kept)]
        found = min(((place, -len(one), one) for place, one in places if place >= 0), default=None)
        if found is not None:
            place, _, tag = found
            before = text[:place].rstrip()
            deltas += content_delta(before)
            self._open_call(tag, text[len(before) : place])
            return text[place + len(tag) :]
        certain = text
        for one in (*self._opens, *self._kept):
            certain = min(certain, split_certain(text, one)[0], key=len)
        self._held = text[len(certain) :]
        deltas += content_delta(certain)
        return ""

    def _seek_next(self, text: str) -> str:
        """Find the next call; blanks and closing tags before it mean nothing."""
        rest = text.lstrip()
        braces = ["{"] if self._syntax.kind == "object" else []
        if not self.num_calls:  # nothing may be taken away before there is a call
            for filler in self._fillers:
                if filler.startswith("<"):
                    rest = rest.removeprefix(filler).lstrip()
        else:
            for filler in self._fillers:
                if rest.startswith(filler):
                    return rest[len(filler) :]
        for tag in (*self._opens, *self._kept, *braces):
            if rest.startswith(tag):
                self._is_between = False
                self._open_call(tag)
                return rest[len(tag) :]
        tags = (*self._opens, *self._kept, *braces, *self._fillers)
        if any(one.startswith(rest) for one in tags):
            self._held = rest if self.num_calls else text
            return ""
        self._is_between = False
        return rest if self.num_calls else text

    def _open_call(self, tag: str, blanks: str = "") -> None:
        """Begin to read what may be a call: `tag` has come, and blanks before it."""
        index, lead = self.num_calls, blanks + tag
        if self._head is not None:
            raw = tag if tag in self._kept else ""
            self._reader = TaggedReader(
                index, self._tools, self._syntax, self._head, lead, raw, self._ids
            )
            return
        is_brace = tag == "{"
        self._reader = ObjectReader(index, self._tools, "" if is_brace else lead)
        if is_brace:
            self._reader.add(tag)

    def _finish_call(self, rest: str, deltas: list[Delta]) -> str:
        """The call is complete: count it, or give it back as text. Returns what is left to read."""
        reader, self._reader = self._reader, None
        assert reader is not None, "no call has begun"
        if reader.is_call:
            self.num_calls += 1
            self._is_between = True
            return rest
        text, again = reader.give_back()
        deltas += content_delta(text)
        return again + rest

    def _keep(self, deltas: list[Delta]) -> list[Delta]:
        return deltas if self._max_calls is None or self.num_calls < self._max_calls else []


def _split_tags(text: str) -> list[str]:
    """Tags, and other characters in rows."""
    parts = (part for word in text.split() for part in re.split(f"({TAG.pattern})", word))
    return [part for part in parts if part]

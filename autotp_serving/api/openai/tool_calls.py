"""Finds the tool calls in a model's text while it comes, in the format of its family. Rank 0 only.

`engine/tool_formats.py` holds the formats. What looks like a call and is none, or calls a tool that
was not offered, stays text, so that nothing a model said is lost.
"""

from __future__ import annotations

import re

from autotp_serving.api.openai.call_readers import (
    CallReader,
    Delta,
    ObjectReader,
    TaggedReader,
    ToolParameters,
    content_delta,
    make_head,
)
from autotp_serving.api.openai.reasoning import split_certain
from autotp_serving.engine.tool_formats import TAG, TOOL_SYNTAXES
from autotp_serving.structured_output import ToolFormat


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

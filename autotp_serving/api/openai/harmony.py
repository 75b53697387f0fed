"""Reads gpt-oss's channels: reasoning, text and tool calls, each a message of its own. Rank 0 only.

    <|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.
    <|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}

The library openai-harmony reads token ids and fetches its vocabulary from the network when it
starts; what is left of it without that is this grammar of six tags.
"""

from __future__ import annotations

import re

from autotp_serving.api.openai.call_readers import (
    MAX_HEAD_LEN,
    Delta,
    ToolParameters,
    begin_call,
    content_delta,
    continue_call,
)
from autotp_serving.api.openai.reasoning import overlap_len

MESSAGE = "<|message|>"
START, CHANNEL = "<|start|>", "<|channel|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START, CHANNEL)
RECIPIENT = re.compile(r"\bto=(?:functions\.)?([a-zA-Z0-9_.-]+)")
NO_HEAD_YET = re.compile(r"\s*(<\|start\|>\w*)?\s*(<\|channel\|>\w*)?\s*")


class HarmonyParser:
    """Text in pieces in, deltas of reasoning, of text and of calls out.

    Args:
        tools: that there are.
        max_calls: further calls are dropped.
        starts_inside: the prompt ends inside the reasoning.
    """

    def __init__(
        self, tools: ToolParameters, max_calls: int | None = None, *, starts_inside: bool = False
    ) -> None:
        self.num_calls = 0
        self._tools = tools
        self._max_calls = max_calls
        self._held = ""
        self._field: str | None = "reasoning_content" if starts_inside else None
        """Of the message that comes; "call" for a call, None in its head."""
        self._seen: set[str] = set()
        self._needs_line = False
        self._has_arguments = False

    def add(self, text: str) -> list[Delta]:
        """Take a piece, return what is certain by now."""
        text, self._held = self._held + text, ""
        deltas: list[Delta] = []
        while text:
            text = (
                self._read_head(text, deltas) if self._field is None else self._read(text, deltas)
            )
        return deltas

    def end(self) -> list[Delta]:
        """What was held back: the text is over."""
        held, self._held = self._held, ""
        if self._field is None:
            return [] if NO_HEAD_YET.fullmatch(held) else content_delta(held)
        return self._tell(held) + self._close()

    def _read_head(self, text: str, deltas: list[Delta]) -> str:
        start = text.lstrip()
        begins = (START, CHANNEL, "to=")
        if not any(one.startswith(start) or start.startswith(one) for one in begins):
            self._open("content")
            return text
        head, message, body = text[: MAX_HEAD_LEN + len(MESSAGE)].partition(MESSAGE)
        if not message:
            if len(text) < MAX_HEAD_LEN + len(MESSAGE):
                self._held = text
                return ""
            self._open("content")
            deltas += self._tell(text[: text.find("<") + 1])
            return text[text.find("<") + 1 :]
        body = text[len(head) + len(MESSAGE) :]
        recipient = RECIPIENT.search(head)
        if recipient is None:
            channel = head.partition(CHANNEL)[2].split()
            self._open("reasoning_content" if channel[:1] == ["analysis"] else "content")
        elif recipient[1] in self._tools:
            self._field = "call"
            self._has_arguments = False
            deltas += self._keep([begin_call(self.num_calls, recipient[1])])
        else:
            self._open("content")
            deltas += self._tell(head + MESSAGE)
        return body

    def _read(self, text: str, deltas: list[Delta]) -> str:
        places = [(place, one) for one in ENDS if (place := text.find(one)) >= 0]
        if not places:
            held_len = max(overlap_len(text, one) for one in ENDS)
            deltas += self._tell(text[: len(text) - held_len])
            self._held = text[len(text) - held_len :]
            return ""
        place, tag = min(places)
        deltas += self._tell(text[:place]) + self._close()
        return text[place if tag in (START, CHANNEL) else place + len(tag) :]

    def _open(self, field: str) -> None:
        self._field = field
        self._needs_line = field in self._seen
        self._seen.add(field)

    def _tell(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._field == "call":
            self._has_arguments = True
            return self._keep(continue_call(self.num_calls, text))
        assert self._field is not None, "no message has begun"
        text, self._needs_line = "\n" * self._needs_line + text, False
        return [{self._field: text}]

    def _close(self) -> list[Delta]:
        deltas: list[Delta] = []
        if self._field == "call":
            if not self._has_arguments:
                deltas = self._keep(continue_call(self.num_calls, "{}"))
            self.num_calls += 1
        self._field = None
        return deltas

    def _keep(self, deltas: list[Delta]) -> list[Delta]:
        return deltas if self._max_calls is None or self.num_calls < self._max_calls else []

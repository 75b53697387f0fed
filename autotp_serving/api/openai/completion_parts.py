"""A completion as a row of parts, for dialects whose replies are made of them. Rank 0 only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from autotp_serving.api.errors import check_reason
from autotp_serving.api.openai.completion_parser import CompletionParser
from autotp_serving.request import RequestOutput, TokenLogprobs

PartKind = Literal["reasoning", "text", "call"]


@dataclass
class Part:
    """One of them, as far as it has come.

    Attributes:
        kind: what it is.
        index: its number in the completion.
        name: of the tool that is called.
        call_id: of the call.
        pieces: of its text; of a call, of its arguments.
        logprobs: of a text, where they were asked for: of the tokens that came with it.
    """

    kind: PartKind
    index: int
    name: str = ""
    call_id: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All that has come of it."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class PartChange:
    """What happens to a part: it begins, grows by a text, or ends."""

    step: Literal["begin", "grow", "end"]
    part: Part
    text: str = ""
    logprobs: Sequence[TokenLogprobs] = ()


class PartReader:
    """One completion's outputs in, changes of its parts out; one part ends before the next begins.

    A completion has at least one part, which may be an empty text.

    Args:
        parser: of the completion; None where all of it is text.
    """

    def __init__(self, parser: CompletionParser | None) -> None:
        self.parts: list[Part] = []
        self.num_reasoning_tokens = 0
        self.last_output: RequestOutput | None = None
        self._parser = parser
        self._open: Part | None = None
        self._held_logprobs: list[TokenLogprobs] = []

    @property
    def reason(self) -> str | None:
        """Why the completion ended; None before."""
        return None if self.last_output is None else self.last_output.finish_reason

    @property
    def has_calls(self) -> bool:
        """True once a tool is called."""
        return any(part.kind == "call" for part in self.parts)

    def add(self, outputs: Sequence[RequestOutput]) -> list[PartChange]:
        """Take outputs. Raises ApiError when one of them has failed."""
        changes: list[PartChange] = []
        for output in outputs:
            check_reason(output)
            self.last_output = output
            read = self._read(output.text, is_last=output.finish_reason is not None)
            changes += self._add_logprobs(output, read)
            if self._open is not None and self._open.kind == "reasoning":
                self.num_reasoning_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                if not self.parts:
                    changes.append(self._begin("text"))
                changes += self._end()
        return changes

    def _add_logprobs(self, output: RequestOutput, changes: list[PartChange]) -> list[PartChange]:
        """The changes that an output makes, its logprobs with the last text that grows.

        Those of tokens whose text is held back wait for it; what turns out to be no text has none.
        """
        self._held_logprobs += output.logprobs
        for number in reversed(range(len(changes))):
            change = changes[number]
            if change.step == "grow":
                logprobs, self._held_logprobs = self._held_logprobs, []
                if change.part.kind == "text":
                    change.part.logprobs += logprobs
                    changes[number] = replace(change, logprobs=logprobs)
                break
        return changes

    def _read(self, text: str, *, is_last: bool) -> list[PartChange]:
        if self._parser is None:
            return self._grow("text", text)
        changes: list[PartChange] = []
        for delta in self._parser.add(text, is_last=is_last):
            changes += self._grow("reasoning", delta.get("reasoning_content", ""))
            changes += self._grow("text", delta.get("content", ""))
            for call in delta.get("tool_calls", ()):
                function = call["function"]
                if "id" in call:
                    changes += self._end()
                    changes.append(self._begin("call", function["name"], call["id"]))
                changes += self._grow("call", function.get("arguments", ""))
        return changes

    def _grow(self, kind: PartKind, text: str) -> list[PartChange]:
        if not text:
            return []
        changes: list[PartChange] = []
        if self._open is None or self._open.kind != kind:
            changes = [*self._end(), self._begin(kind)]
        part = self.parts[-1]
        part.pieces.append(text)
        return [*changes, PartChange("grow", part, text)]

    def _begin(self, kind: PartKind, name: str = "", call_id: str = "") -> PartChange:
        self._open = Part(kind, len(self.parts), name, call_id)
        self.parts.append(self._open)
        return PartChange("begin", self._open)

    def _end(self) -> list[PartChange]:
        part, self._open = self._open, None
        return [] if part is None else [PartChange("end", part)]

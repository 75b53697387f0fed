"""What the parts of a completion are: reasoning, text, tool calls. Rank 0 only.

Which parsers a model needs is read off its chat template, unless a flag says otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from autotp_serving.api.openai.reasoning import CLOSE, OPEN, ThinkSplitter
from autotp_serving.api.openai.tool_calls import Delta, ToolCallParser, find_format
from autotp_serving.config import ServingConfig
from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.structured_output import Reasoning, ToolFormat

PROMPT_TAIL_LEN = 8

NO_TOOLS = (
    "tools: this model's chat template knows none, so they were left out; if it does, see "
    "--tool-call-parser"
)
"""What the reply's header tells where they were."""

FORCED_FORMAT: ToolFormat = "hermes"
"""Of calls that a grammar forces on a model whose chat template knows none."""


class CompletionParser:
    """One completion's text in pieces in, deltas of its message out."""

    def __init__(
        self, splitter: ThinkSplitter | None, caller: ToolCallParser | None, *, is_chosen: bool
    ) -> None:
        self._splitter = splitter
        self._caller = caller
        self._is_chosen = is_chosen

    def finish_reason(self, reason: str | None) -> str | None:
        """The reason in OpenAI's words: a completion that calls a tool ends for that.

        Unless the client chose the tool itself: then the call is what it asked for.
        """
        has_calls = self._caller is not None and self._caller.num_calls > 0
        return "tool_calls" if reason == "stop" and has_calls and not self._is_chosen else reason

    def add(self, text: str, *, is_last: bool) -> list[Delta]:
        """Take a piece, return what is certain by now: all of it, after the last piece."""
        reasoning = ""
        if self._splitter is not None:
            reasoning, text = self._splitter.add(text)
            if is_last:
                rest = self._splitter.end()
                reasoning, text = reasoning + rest[0], text + rest[1]
        deltas: list[Delta] = [{"reasoning_content": reasoning}] if reasoning else []
        if self._caller is None:
            return [*deltas, {"content": text}] if text else deltas
        deltas += self._caller.add(text)
        return [*deltas, *self._caller.end()] if is_last else deltas


class CompletionParsers:
    """Makes the parsers that the model's completions need."""

    def __init__(self, tokenizer: Tokenizer, config: ServingConfig) -> None:
        template = tokenizer.chat_template
        self._tokenizer = tokenizer
        self.splits_reasoning = config.reasoning_parser == "think" or (
            config.reasoning_parser == "auto" and OPEN in template and CLOSE in template
        )
        self.tool_format: ToolFormat | None = {
            "auto": find_format(template), "none": None, "hermes": "hermes", "llama3": "llama3",
        }[config.tool_call_parser]  # fmt: skip

    def call_format(self, *, is_required: bool) -> ToolFormat | None:
        """How calls are written; None where the model has not learned to, and none is required."""
        return self.tool_format or (FORCED_FORMAT if is_required else None)

    def reasoning(self, prompt_token_ids: Sequence[int]) -> Reasoning | None:
        """Whether the completion may begin with reasoning, or the prompt ends inside it."""
        if not self.splits_reasoning:
            return None
        tail = list(prompt_token_ids[-PROMPT_TAIL_LEN:])
        prompt = self._tokenizer.decode(tail, skip_special_tokens=False)
        return "begun" if prompt.rstrip().endswith(OPEN) else "possible"

    def make(
        self,
        reasoning: Reasoning | None,
        names: Collection[str],
        max_calls: int | None,
        *,
        is_chosen: bool = False,
        is_required: bool = False,
    ) -> CompletionParser | None:
        """A parser for one completion; None where there is nothing to part.

        Args:
            reasoning: whether it may have any.
            names: of the tools that may be called.
            max_calls: further calls are dropped.
            is_chosen: the client chose the one tool to be called.
            is_required: the completion is nothing but calls.
        """
        splitter = caller = None
        if reasoning is not None:
            splitter = ThinkSplitter(starts_inside=reasoning == "begun")
        tool_format = self.call_format(is_required=is_required)
        if names and tool_format is not None:
            caller = ToolCallParser(tool_format, names, max_calls)
        return (
            CompletionParser(splitter, caller, is_chosen=is_chosen) if splitter or caller else None
        )


def join(deltas: Sequence[Delta]) -> dict[str, Any]:
    """The fields of a whole message."""
    texts = {"content": "", "reasoning_content": ""}
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for name in texts.keys() & delta.keys():
            texts[name] += delta[name]
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                whole = {key: value for key, value in call.items() if key != "index"}
                calls.append(whole | {"function": dict(call["function"])})
            else:
                arguments = call["function"]["arguments"]
                calls[call["index"]]["function"]["arguments"] += arguments
    message: dict[str, Any] = {"content": texts["content"]}
    if texts["reasoning_content"]:
        message["reasoning_content"] = texts["reasoning_content"]
    if calls:
        message |= {"content": texts["content"] or None, "tool_calls": calls}
    return message

"""What the parts of a completion are: reasoning, text, tool calls. Rank 0 only.

Which parsers a model needs is read off its chat template, unless a flag says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from autotp_serving.api.openai.call_readers import Delta, ToolParameters
from autotp_serving.api.openai.harmony import HarmonyParser
from autotp_serving.api.openai.reasoning import ThinkSplitter
from autotp_serving.api.openai.reasoning_options import ReasoningOptions
from autotp_serving.api.openai.tool_calls import ToolCallParser
from autotp_serving.config import ServingConfig
from autotp_serving.engine.reasoning_formats import REASONING_SYNTAXES, find_reasoning_format
from autotp_serving.engine.thinking_budget import BudgetTags, ThinkingBudget
from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.engine.tool_formats import find_formats
from autotp_serving.structured_output import Grammar, Reasoning, ReasoningFormat, ToolFormat

PROMPT_TAIL_LEN = 32

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
        self,
        splitter: ThinkSplitter | None,
        caller: ToolCallParser | HarmonyParser | None,
        *,
        is_chosen: bool,
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
        self.reasoning_options = ReasoningOptions(template)
        found: ToolFormat | ReasoningFormat | None
        reasoning = config.reasoning_parser
        found = find_reasoning_format(template) if reasoning == "auto" else _named(reasoning)
        self.reasoning_format = cast(ReasoningFormat | None, found)
        self._budget_tags: BudgetTags | None = None
        calls = config.tool_call_parser
        found = next(iter(find_formats(template)), None) if calls == "auto" else _named(calls)
        self.tool_format = cast(ToolFormat | None, found)

    def call_format(self, *, is_required: bool) -> ToolFormat | None:
        """How calls are written; None where the model has not learned to, and none is required."""
        return self.tool_format or (FORCED_FORMAT if is_required else None)

    def reasoning(self, prompt_token_ids: Sequence[int]) -> Reasoning | None:
        """Whether the completion may begin with reasoning, or the prompt ends inside it."""
        if self.reasoning_format is None:
            return None
        tail = list(prompt_token_ids[-PROMPT_TAIL_LEN:])
        prompt = self._tokenizer.decode(tail, skip_special_tokens=False)
        tag = REASONING_SYNTAXES[self.reasoning_format].open
        return "begun" if prompt.rstrip().endswith(tag) else "possible"

    def limit_reasoning(
        self, grammar: Grammar | None, num_tokens: int | None, reasoning: Reasoning | None
    ) -> Grammar | None:
        """A grammar that beside what it was asks for reasoning of so many tokens at most.

        Without reasoning every limit is kept to.
        """
        if num_tokens is None or reasoning is None or self.reasoning_format is None:
            return grammar
        if self._budget_tags is None:
            self._budget_tags = BudgetTags(self._tokenizer, self.reasoning_format)
        return ThinkingBudget(num_tokens, self._budget_tags, reasoning == "begun", grammar)

    def make(
        self,
        reasoning: Reasoning | None,
        tools: ToolParameters,
        max_calls: int | None,
        *,
        is_chosen: bool = False,
        is_required: bool = False,
    ) -> CompletionParser | None:
        """A parser for one completion; None where there is nothing to part.

        Args:
            reasoning: whether it may have any.
            tools: that may be called.
            max_calls: further calls are dropped.
            is_chosen: the client chose the one tool to be called.
            is_required: the completion is nothing but calls.
        """
        splitter: ThinkSplitter | None = None
        caller: ToolCallParser | HarmonyParser | None = None
        is_inside = reasoning == "begun"
        tool_format = self.call_format(is_required=is_required)
        has_channels = self.reasoning_format == "harmony"
        if reasoning is not None and self.reasoning_format is not None and not has_channels:
            syntax = REASONING_SYNTAXES[self.reasoning_format]
            splitter = ThinkSplitter(syntax, starts_inside=is_inside)
        if has_channels or tool_format == "harmony":
            caller = HarmonyParser(tools, max_calls, starts_inside=is_inside and has_channels)
        elif tools and tool_format is not None:
            caller = ToolCallParser(tool_format, tools, max_calls)
        return (
            CompletionParser(splitter, caller, is_chosen=is_chosen) if splitter or caller else None
        )


def _named(choice: str) -> Any:
    """The format that a flag names; None for none."""
    return None if choice == "none" else choice


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

"""Structured output as asked for, and who sees to it. Rank 0 only, standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

StructureKind = Literal["text", "json_object", "json_schema", "regex", "choice", "grammar"]
ToolFormat = Literal[
    "hermes", "llama3", "mistral", "mistral_json", "qwen3_coder", "glm45", "minimax_m2",
    "deepseek_v3", "deepseek_v31", "kimi_k2", "phi4", "granite", "gemma4", "functiongemma",
    "harmony",
]  # fmt: skip
ReasoningFormat = Literal["think", "mistral", "gemma4", "granite", "harmony"]
Reasoning = Literal["begun", "possible"]


@dataclass(frozen=True)
class CallableTool:
    """A tool whose calls are held to a form.

    Attributes:
        name: what it is called by.
        schema: JSON schema of its arguments, always an object's.
        is_strict: False lets pass what the schema says and cannot be held to.
    """

    name: str
    schema: str
    is_strict: bool


@dataclass(frozen=True)
class ToolCalls:
    """Tool calls, as a model writes them into its completion.

    Attributes:
        tool_format: how it writes them.
        tools: what may be called.
        is_required: the completion is nothing but calls; otherwise it may do without.
        is_single: one call at most.
    """

    tool_format: ToolFormat
    tools: tuple[CallableTool, ...]
    is_required: bool = False
    is_single: bool = False


@dataclass(frozen=True)
class StructuredOutput:
    """A structured output that was asked for.

    Attributes:
        kind: what `source` is written in; "text" is free.
        source: a JSON schema, a regular expression, a JSON list of texts, or a grammar (Lark or
            GBNF); "" for text and json_object.
        calls: tool calls that the completion must or may have instead.
        reasoning: free text comes first: it has begun already in the prompt, or is possible.
        reasoning_format: how it is marked.
    """

    kind: StructureKind
    source: str = ""
    calls: ToolCalls | None = None
    reasoning: Reasoning | None = None
    reasoning_format: ReasoningFormat = "think"


def structure_to_plain(structured_output: StructuredOutput) -> dict[str, Any]:
    """A structured output as plain values, for another process."""
    return asdict(structured_output)


def structure_from_plain(plain: dict[str, Any]) -> StructuredOutput:
    """The structured output that `structure_to_plain` had."""
    calls = plain["calls"]
    if calls is not None:
        tools = tuple(CallableTool(**tool) for tool in calls["tools"])
        calls = ToolCalls(**{**calls, "tools": tools})
    return StructuredOutput(**{**plain, "calls": calls})


class Guide(Protocol):
    """Follows one completion through its structured output."""

    @property
    def error(self) -> str | None:
        """Why the structured output can be followed no more; None while it can."""
        ...

    @property
    def is_ready(self) -> bool:
        """True when `allowed` can be told at once, or nearly so."""
        ...

    def wait(self, seconds: float) -> None:
        """Return once it is ready, or when the time is over."""
        ...

    def allowed(self, num_ahead: int = 0) -> bytes | None:
        """Tokens that may come next, as packed bits: bit t % 32 of native 32-bit word t // 32.

        None where any may.

        Args:
            num_ahead: so many of the tokens that `look_ahead` returned come before.
        """
        ...

    def look_ahead(self, guesses: Sequence[int], limit: int) -> list[int]:
        """Up to so many tokens that may come after each other: all that must come, and guesses as
        far as they may. None that would complete it. Where telling takes long there are none.
        """
        ...

    def accept(self, token_id: int) -> bool:
        """Take the token that was chosen; True when the completion is complete with it."""
        ...


class Grammar(Protocol):
    """A structured output made ready for use, shared by all requests that ask for it."""

    def start(self) -> Guide:
        """Begin a completion."""
        ...

"""The form that an answer must have, and who sees to it. Rank 0 only, standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

StructureKind = Literal["text", "json_object", "json_schema", "regex", "choice", "grammar"]
ToolFormat = Literal["hermes", "llama3"]
Thoughts = Literal["begun", "possible"]


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
    """Calls of tools, as a model writes them into its answer.

    Attributes:
        form: how it writes them.
        tools: what may be called.
        is_required: the answer is nothing but calls; otherwise it may do without.
        is_single: one call at most.
    """

    form: ToolFormat
    tools: tuple[CallableTool, ...]
    is_required: bool = False
    is_single: bool = False


@dataclass(frozen=True)
class Structure:
    """A form that an answer must have.

    Attributes:
        kind: what `source` is written in; "text" is free.
        source: a JSON schema, a regular expression, a JSON list of texts, or a grammar (Lark or
            GBNF); "" for text and json_object.
        calls: calls of tools that the answer must or may have instead.
        thoughts: free text up to `</think>` comes first: it has begun already in the prompt, or is
            possible.
    """

    kind: StructureKind
    source: str = ""
    calls: ToolCalls | None = None
    thoughts: Thoughts | None = None


def structure_to_plain(structure: Structure) -> dict[str, Any]:
    """A structure as plain values, for another process."""
    return asdict(structure)


def structure_from_plain(plain: dict[str, Any]) -> Structure:
    """The structure that `structure_to_plain` had."""
    calls = plain["calls"]
    if calls is not None:
        tools = tuple(CallableTool(**tool) for tool in calls["tools"])
        calls = ToolCalls(**{**calls, "tools": tools})
    return Structure(**{**plain, "calls": calls})


class Guide(Protocol):
    """Follows one answer through the structure it must have."""

    error: str | None
    """Why no answer can be completed any more; None while it can. The structure is to blame."""

    @property
    def is_ready(self) -> bool:
        """True when `allowed` can be told at once, or nearly so."""
        ...

    def wait(self, seconds: float) -> None:
        """Return once it is ready, or when the time is over."""
        ...

    def allowed(self) -> bytes:
        """Tokens that may come next, as packed bits: bit t % 32 of native 32-bit word t // 32."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take the token that was chosen; True when the answer is complete with it."""
        ...


class Grammar(Protocol):
    """A structure made ready for use, shared by all requests that ask for it."""

    def start(self) -> Guide:
        """Begin an answer."""
        ...

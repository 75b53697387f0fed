"""How families of models mark their reasoning, as data. Rank 0 and its helper processes."""

from __future__ import annotations

from dataclasses import dataclass

from autotp_serving.engine.tool_formats import TAG
from autotp_serving.structured_output import ReasoningFormat


@dataclass(frozen=True)
class ReasoningSyntax:
    """How reasoning is written, at the beginning of a completion.

    Attributes:
        marks: texts that a chat template holds if the model reasons so.
        open: before the reasoning; the prompt may end in it.
        close: after it.
        next: what comes between it and the answer.
        answer: the answer's own beginning.
    """

    marks: tuple[str, ...]
    open: str
    close: str
    next: str = ""
    answer: str = ""


REASONING_SYNTAXES: dict[ReasoningFormat, ReasoningSyntax] = {
    "think": ReasoningSyntax(("</think>",), "<think>", "</think>"),
    "mistral": ReasoningSyntax(("[THINK]", "[/THINK]"), "[THINK]", "[/THINK]"),
    "gemma4": ReasoningSyntax(("<|channel>", "<channel|>"), "<|channel>thought", "<channel|>"),
    "granite": ReasoningSyntax(
        ("Here is my thought process:", "Here is my response:"),
        "Here is my thought process:",
        "Here is my response:",
    ),
    "harmony": ReasoningSyntax(
        ("<|channel|>", "<|message|>"),
        "<|channel|>analysis<|message|>",
        "<|end|>",
        "<|start|>assistant",
        "<|channel|>final<|message|>",
    ),
}


def find_reasoning_format(chat_template: str) -> ReasoningFormat | None:
    """The format whose marks a chat template holds."""
    for name, syntax in REASONING_SYNTAXES.items():
        if all(mark in chat_template for mark in syntax.marks):
            return name
    return None


def list_reasoning_tags() -> frozenset[str]:
    """Tags around reasoning, to be kept in a text even where a tokenizer calls them special."""
    texts = (f"{one.open} {one.close}" for name, one in REASONING_SYNTAXES.items()
             if name != "harmony")  # fmt: skip
    return frozenset(tag for text in texts for tag in TAG.findall(text))

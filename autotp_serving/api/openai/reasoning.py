"""Parts reasoning from content while the text comes. Rank 0 only."""

from __future__ import annotations

from autotp_serving.engine.reasoning_formats import REASONING_SYNTAXES, ReasoningSyntax


def overlap_len(text: str, tag: str) -> int:
    """Length of the longest end of `text` that may be the beginning of `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


def split_certain(text: str, tag: str) -> tuple[str, str]:
    """Cut off what may belong to a tag that is still to come, and the blanks before it."""
    certain = text[: len(text) - overlap_len(text, tag)].rstrip()
    return certain, text[len(certain) :]


class ThinkSplitter:
    """Text in pieces in, reasoning and content out, their blank edges left out.

    Only reasoning at the beginning counts; a tag in the middle of a completion is text.

    Args:
        syntax: how it is marked.
        starts_inside: the prompt ends in the opening tag already, as some templates have it.
    """

    def __init__(
        self, syntax: ReasoningSyntax = REASONING_SYNTAXES["think"], *, starts_inside: bool = False
    ) -> None:
        self._open_tag, self._close_tag = syntax.open, syntax.close
        self._held = ""
        self._is_inside: bool | None = True if starts_inside else None  # None: not known yet
        self._has_reasoning = False
        self._has_content = False

    def add(self, text: str) -> tuple[str, str]:
        """Take a piece; return what it adds for certain to the reasoning and to the content."""
        text = self._held + text
        self._held = ""
        if self._is_inside is None:
            start = text.lstrip()
            if self._open_tag.startswith(start) and start != self._open_tag:
                self._held = text
                return "", ""
            self._is_inside = start.startswith(self._open_tag)
            if not self._is_inside:
                self._has_content = True  # its first blanks are its own
                return "", text
            text = start[len(self._open_tag) :]
        if not self._is_inside:
            return "", self._content(text)
        reasoning, closing, content = text.partition(self._close_tag)
        if closing:
            self._is_inside = False
            return self._reasoning(reasoning.rstrip()), self._content(content)
        reasoning, self._held = split_certain(text, self._close_tag)
        return self._reasoning(reasoning), ""

    def end(self) -> tuple[str, str]:
        """What was held back: the text is over."""
        text, self._held = self._held, ""
        return (self._reasoning(text.rstrip()), "") if self._is_inside else ("", text)

    def _reasoning(self, text: str) -> str:
        if not self._has_reasoning:
            text = text.lstrip()
            self._has_reasoning = bool(text)
        return text

    def _content(self, text: str) -> str:
        if not self._has_content:
            text = text.lstrip()
            self._has_content = bool(text)
        return text

"""Parts a model's thoughts, `<think>...</think>`, from its answer while it comes. Rank 0 only."""

from __future__ import annotations

OPEN = "<think>"
CLOSE = "</think>"


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
    """Text in pieces in, thoughts and answer out, their blank edges left out.

    Only thoughts at the beginning count; a tag in the middle of an answer is text.

    Args:
        starts_inside: the prompt ends in the opening tag already, as some templates have it.
    """

    def __init__(self, *, starts_inside: bool = False) -> None:
        self._held = ""
        self._is_inside: bool | None = True if starts_inside else None  # None: not known yet
        self._has_thoughts = False
        self._has_answer = False

    def add(self, text: str) -> tuple[str, str]:
        """Take a piece; return what it adds for certain to the thoughts and to the answer."""
        text = self._held + text
        self._held = ""
        if self._is_inside is None:
            start = text.lstrip()
            if OPEN.startswith(start) and start != OPEN:
                self._held = text
                return "", ""
            self._is_inside = start.startswith(OPEN)
            if not self._is_inside:
                self._has_answer = True  # its first blanks are its own
                return "", text
            text = start[len(OPEN) :]
        if not self._is_inside:
            return "", self._answer(text)
        thoughts, closing, answer = text.partition(CLOSE)
        if closing:
            self._is_inside = False
            return self._thoughts(thoughts.rstrip()), self._answer(answer)
        thoughts, self._held = split_certain(text, CLOSE)
        return self._thoughts(thoughts), ""

    def end(self) -> tuple[str, str]:
        """What was held back: the text is over."""
        text, self._held = self._held, ""
        return (self._thoughts(text.rstrip()), "") if self._is_inside else ("", text)

    def _thoughts(self, text: str) -> str:
        if not self._has_thoughts:
            text = text.lstrip()
            self._has_thoughts = bool(text)
        return text

    def _answer(self, text: str) -> str:
        if not self._has_answer:
            text = text.lstrip()
            self._has_answer = bool(text)
        return text

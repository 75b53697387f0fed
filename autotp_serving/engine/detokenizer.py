"""Tokens to text while they come: never a broken character, stop strings cut out. Rank 0 only.

Decoding a token by itself is wrong: a character may span tokens, and sentencepiece drops a space
where text begins. So a short window of tokens is decoded again each time, starting in text that
is out already, and what is new at its end is emitted. Prompt text + deltas = the whole text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.request import SamplingParams

BROKEN = "\ufffd"
"""What undecodable bytes become; never emitted."""

WINDOW_LEN = 8
"""Tokens by which the window grows before its first half is let go."""

MAX_WINDOW_LEN = 64
"""Tokens after which the window moves on even if nothing decodes: noise must not cost O(n^2)."""

MAX_CHAR_TOKENS = 4
"""A UTF-8 character has at most 4 bytes, and a token at least one of them."""


class IncrementalDecoder:
    """Turns tokens into text deltas that add up to the text of all tokens.

    Args:
        tokenizer: decodes.
        prompt_token_ids: the text is a continuation of these.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool = True,
    ) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
        self._window = self._find_tail(prompt_token_ids)
        self._num_old = self._num_emitted = 0
        self._begin_window(len(self._window))

    def add(self, token_id: int) -> str:
        """Take one token, return the text it completed, "" while bytes are missing."""
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip(BROKEN)
        delta = whole[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(whole))
        if len(whole) == len(text) and len(self._window) - self._num_old >= WINDOW_LEN:
            del self._window[: self._num_old]
            self._begin_window(len(self._window))
        elif len(self._window) >= MAX_WINDOW_LEN:
            del self._window[: -(MAX_CHAR_TOKENS - 1)]
            self._begin_window(0)
        return delta.replace(BROKEN, "")

    def _begin_window(self, num_old: int) -> None:
        """Note what of the window is out already; its first `num_old` tokens end in a whole
        character, so the next window can begin after them."""
        self._num_old = num_old
        self._num_emitted = len(self._decode(self._window).rstrip(BROKEN))

    def _find_tail(self, token_ids: Sequence[int]) -> list[int]:
        """Last tokens of a prompt, beginning with a whole character."""
        for tail_len in range(WINDOW_LEN, WINDOW_LEN + MAX_CHAR_TOKENS):
            tail = list(token_ids[-tail_len:])
            if not self._decode(tail).startswith(BROKEN):
                break
        return tail


class StopStrings:
    """Finds the first of several strings in a text that comes in pieces.

    Args:
        stop: what to look for, none of them empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """Take a piece of text, return what is certain not to belong to a stop string.

        Sets `found` to the one that is complete; it and what follows are never returned.
        """
        text = self._held + piece
        starts = [(text.find(stop), stop) for stop in self._stop]
        matches = [(start + len(stop), start, stop) for start, stop in starts if start >= 0]
        if matches:
            # The one complete first, and so the same one however the text is cut into pieces.
            _, start, self.found = min(matches)
            self._held = ""
            return text[:start]
        held_len = max((self._overlap_len(text, stop) for stop in self._stop), default=0)
        certain_len = len(text) - held_len
        self._held = text[certain_len:]
        return text[:certain_len]

    def flush(self) -> str:
        """Return what was held back: the text is over, so it begins no stop string."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap_len(text: str, stop: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of `stop`."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0


class Detokenizer:
    """One request's text: decoding, then stop strings.

    Args:
        tokenizer: decodes.
        prompt_token_ids: the text is a continuation of these.
        params: what ends the text, and what belongs to it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stop_strings = StopStrings(params.stop)
        self._num_tokens_before_stop = params.min_tokens

    @property
    def stopped(self) -> bool:
        """True once a stop string was found."""
        return self.stop_string is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text."""
        return self._stop_strings.found

    def add(self, token_id: int) -> str:
        """Take one token, return the text that is certain by now, possibly ""."""
        text = self._decoder.add(token_id)
        if self._num_tokens_before_stop:  # too early for a stop string, even for a part of one
            self._num_tokens_before_stop -= 1
            return text
        return self._stop_strings.add(text)

    def flush(self) -> str:
        """Return the text held back, at the end of the request. Bytes cut short give no text."""
        return self._stop_strings.flush()

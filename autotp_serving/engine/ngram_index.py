"""Prompt look-up: what followed the same tokens before, in the prompt or the answer. Rank 0 only.

After Saxena 2023, "Prompt lookup decoding". An answer that quotes its prompt, or itself, goes on as
the quoted text does, and finding that takes no model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

NGRAM_LEN = 3
"""Equal tokens that make a quotation. Two are met by chance in any longer text."""

MAX_INDEXED_LEN = 2**15
"""Latest tokens that are indexed when a sequence is looked into for the first time: it bounds the
time, some milliseconds, and the table, 256 KiB."""


class NgramIndex:
    """Where each n-gram of one sequence was last, in a table of fixed size without their texts.

    Two n-grams may want one place; the later one has it, and a look-up compares the tokens.

    Args:
        max_len: tokens that the sequence can come to.
    """

    def __init__(self, max_len: int) -> None:
        size = 2 ** min(2 * max_len, 2 * MAX_INDEXED_LEN).bit_length()
        self._ends = array("i", [0]) * (size // 2)
        self._num_seen = 0

    def look_up(self, token_ids: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that came after the sequence's last n-gram when it was there before.

        Where they run into the sequence's end they go on from where they began, as a text that
        repeats itself does. [] where it was never there.

        Args:
            token_ids: the whole sequence, which only grows from call to call.
        """
        ends, mask, num_tokens = self._ends, len(self._ends) - 1, len(token_ids)
        first = max(self._num_seen, num_tokens - MAX_INDEXED_LEN, NGRAM_LEN)
        for end in range(first, num_tokens):
            ends[hash(tuple(token_ids[end - NGRAM_LEN : end])) & mask] = end
        self._num_seen = max(first, num_tokens)
        last = token_ids[-NGRAM_LEN:]
        end = ends[hash(tuple(last)) & mask]
        if not end or token_ids[end - NGRAM_LEN : end] != last:
            return []
        period = num_tokens - end
        return [token_ids[end + offset % period] for offset in range(count)]

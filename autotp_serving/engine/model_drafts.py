"""Drafts of a smaller model (--draft-model): what it has read, and what it is asked. Rank 0 only.

It reads a sequence when that is to have drafts for the first time, and then what came since. Its
keys and values lie in the blocks of the same numbers as the model's, so blocks that are lost or
taken are so for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from autotp_serving.batch import Batch, DraftInput
from autotp_serving.engine.batch_builder import send_blocks
from autotp_serving.engine.sequence import Sequence, draw_uniform

Draft = Callable[[Batch, list[DraftInput]], list[list[int]]]
"""See `Runner.draft`."""

MAX_NEW = 16
"""Tokens of a sequence that a step may bring, or nearly."""


@dataclass(slots=True)
class Reading:
    """What the draft model has of one sequence.

    Attributes:
        num_read: leading tokens of which it has keys and values.
        ahead: tokens after those that it read as its own guesses.
    """

    num_read: int = 0
    ahead: list[int] = field(default_factory=list)

    def settle(self, sequence: Sequence) -> None:
        """Take guesses that came true for read."""
        self.num_read = min(self.num_read, sequence.num_tokens - 1)
        for guess in self.ahead:
            if self.num_read >= sequence.num_tokens - 1:
                break
            if sequence.token_ids[self.num_read] != guess:
                break
            self.num_read += 1
        self.ahead = []

    def cut(self, num_tokens: int) -> None:
        """What is behind so many tokens is not there any more."""
        if num_tokens < self.num_read:
            self.num_read, self.ahead = num_tokens, []


class ModelDrafts:
    """Asks the draft model.

    Args:
        draft: see `Runner.draft`.
        max_tokens: most that it reads at once.

    Attributes:
        has_caught_up: it read more, the last time, than what came in a step before.
        has_guessed: it ran for the next step.
        num_read: tokens that it read then, its own guesses not counted.
    """

    def __init__(self, draft: Draft, max_tokens: int) -> None:
        self.has_caught_up = self.has_guessed = False
        self.num_read = 0
        self._draft = draft
        self._max_tokens = max_tokens
        self._guesses: dict[Sequence, list[int]] = {}

    def prepare(
        self, wanted: list[tuple[Sequence, int]], has_room: Callable[[Sequence, int], bool]
    ) -> None:
        """Guess for several sequences at once, so many tokens of each.

        Those of which there is much to read have that done part by part, and guesses later.
        """
        self._guesses, self.num_read = {}, 0
        batch = Batch([], [], [], [], [])
        asked: list[tuple[Sequence, Reading]] = []
        drafts: list[DraftInput] = []
        num_left = self._max_tokens
        for sequence, count in wanted:
            if num_left == 0 or not has_room(sequence, count):
                continue
            assert sequence.drafts is not None, "its first step had no drafts"
            reading = sequence.drafts.reading
            reading.settle(sequence)
            start = reading.num_read
            token_ids = sequence.token_ids[start : start + num_left]
            num_left -= len(token_ids)
            self.has_caught_up |= len(token_ids) > MAX_NEW
            self.num_read += len(token_ids)
            index = len(batch.rows)
            batch.rows.append(sequence.row)
            batch.starts.append(start)
            batch.query_lens.append(len(token_ids))
            batch.num_known.append(len(token_ids))
            batch.token_ids.extend(token_ids)
            if len(sequence.block_table) > sequence.num_sent_blocks:
                send_blocks(batch, index, sequence)
            reading.num_read += len(token_ids)
            if reading.num_read == sequence.num_tokens:
                batch.sampled.append(index)
                drafts.append(make_draft_input(sequence, count))
                asked.append((sequence, reading))
        if not batch.rows:
            return
        self.has_guessed = True
        for (sequence, reading), found in zip(asked, self._draft(batch, drafts), strict=True):
            self._guesses[sequence] = found
            reading.ahead = found[:-1]  # the last was not read

    def look_up(self, sequence: Sequence, count: int) -> list[int]:
        """Up to so many of the guesses."""
        return self._guesses.get(sequence, [])[:count]


def make_draft_input(sequence: Sequence, count: int) -> DraftInput:
    """How to guess the next tokens: with the draws that the model itself will have."""
    params = sequence.params
    first = sequence.num_output_tokens
    uniforms = tuple(draw_uniform(sequence.draw_key, first + ahead) for ahead in range(count))
    return DraftInput(uniforms, params.temperature, params.top_k, params.top_p, params.min_p)

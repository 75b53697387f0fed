"""What sampling needs of a step's logits, brought to rank 0 from the ranks' slices. Every rank.

A row of logits over a large vocabulary is some hundred kilobytes; to choose a token mostly takes
the largest of them, or the few largest. So each rank looks for those in its own slice, and only
rows that need more are gathered whole. They go by the all-reduce of the model's layers, in memory
that the ranks share: torch's gather to one rank takes a hundred times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.batch import Batch
from autotp_serving.layers.head import PoolingHead, VocabParallelHead
from autotp_serving.request import MAX_CANDIDATES

NUM_SENT = MAX_CANDIDATES + 1
"""Logits that a rank sends of a row with a top_k: one more than are drawn from at most."""

SMALL_BYTES = 2**15
"""So much of whole rows is gathered in the time that it takes to look for candidates."""

CLEAR_SHARE, CLEAR_GAP = 2.0**-20, 1e-30
"""Two logits that differ by more than this share of the smaller one's distance from the largest,
and by more than this gap, do so in float32 at any temperature."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The largest logits of some rows.

    Attributes:
        rows: which rows these are, ascending.
        values: [num_rows, num_candidates] float32, the largest first.
        token_ids: [num_rows, num_candidates] int64; of equal first logits the lowest id is first.
    """

    rows: list[int]
    values: Tensor
    token_ids: Tensor


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What rank 0 has of a step's logits. Rows are those of the samples, then the scored ones.

    Attributes:
        whole: [num_whole, vocab_size], in the model's type.
        whole_rows: which rows these are, ascending; None: all of them.
        best: rows of which the largest logit is known.
        top: rows of which the MAX_CANDIDATES largest are known.
    """

    whole: Tensor
    whole_rows: list[int] | None = None
    best: Candidates | None = None
    top: Candidates | None = None

    def find_best(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """The largest logit of each of the first rows, and its token, the lowest of several.

        Returns:
            [num_samples] of a floating type, and [num_samples] int64.
        """
        if self.whole_rows is None:
            return self.whole[:num_samples].max(dim=-1)
        if self.best is not None and len(self.best.rows) == num_samples:
            return self.best.values[:, 0], self.best.token_ids[:, 0]
        values = self.whole.new_empty(num_samples, dtype=torch.float32)
        token_ids = self.whole.new_empty(num_samples, dtype=torch.int64)
        for part in filter(None, (self.best, self.top)):
            values[part.rows], token_ids[part.rows] = part.values[:, 0], part.token_ids[:, 0]
        rows = [row for row in self.whole_rows if row < num_samples]
        if rows:
            best, token_ids[rows] = self.whole[: len(rows)].max(dim=-1)
            values[rows] = best.float()
        return values, token_ids

    def select(self, rows: Sequence[int]) -> Tensor:
        """A copy of whole rows, [num_rows, vocab_size]."""
        if self.whole_rows is not None:
            places = {row: place for place, row in enumerate(self.whole_rows)}
            rows = [places[row] for row in rows]
        return self.whole[torch.tensor(rows, device=self.whole.device)]

    def skip(self, num_samples: int) -> Tensor:
        """The rows after those of the samples, [num_scored, vocab_size]."""
        if self.whole_rows is None:
            return self.whole[num_samples:]
        return self.whole[sum(row < num_samples for row in self.whole_rows) :]


class LogitsGatherer:
    """Makes `StepLogits` of what the model's head puts out.

    Args:
        head: told here whether it is to gather all logits itself.
        by_candidates: send only what is needed. The model must do the same to each logit of a row
            whatever its place, and to wait for the device must cost nothing.
    """

    def __init__(self, head: VocabParallelHead | PoolingHead, *, by_candidates: bool) -> None:
        has_enough = head.vocab_size // head.num_ranks >= NUM_SENT
        head.gathers = head.num_ranks == 1 or not (by_candidates and has_enough)
        self._head = head

    def __call__(self, logits: Tensor, batch: Batch) -> StepLogits:
        """Gather what the batch's samples and scores need; all ranks must do so together.

        Args:
            logits: [num_logit_rows, vocab_size], or this rank's slice where the head does not
                gather.

        Returns:
            On ranks other than 0 it means nothing.
        """
        if self._head.gathers or not len(logits):
            return StepLogits(logits)
        if len(logits) * self._head.vocab_size * logits.itemsize <= SMALL_BYTES:
            return StepLogits(self._head.gather(logits))
        num_top = batch.num_top or [1] * batch.num_samples
        best_rows = [row for row, count in enumerate(num_top) if count == 1]
        top_rows = [row for row, count in enumerate(num_top) if count > 1]
        whole_rows = [row for row, count in enumerate(num_top) if count == 0]
        whole_rows += range(len(num_top), len(logits))
        best = top = None
        if best_rows or top_rows:
            best, top = self._gather_candidates(logits, best_rows, top_rows)
        if top is not None:
            clear = find_clear_rows(top.values, [num_top[row] for row in top_rows])
            rows = [top_rows[place] for place in clear]
            whole_rows = sorted({*whole_rows, *top_rows} - {*rows})
            top = Candidates(rows, top.values[clear, :-1], top.token_ids[clear, :-1])
        whole = logits[:0]
        if whole_rows:
            whole = self._head.gather(pick(logits, whole_rows))
        return StepLogits(whole, whole_rows, best, top)

    def _gather_candidates(
        self, logits: Tensor, best_rows: list[int], top_rows: list[int]
    ) -> tuple[Candidates | None, Candidates | None]:
        """The largest logit of some rows and the NUM_SENT largest of others, on every rank."""
        head, num_best, num_top = self._head, len(best_rows), len(top_rows)
        # In float32, which holds the token ids of any vocabulary.
        sent = torch.zeros(2, head.num_ranks, num_best + num_top * NUM_SENT)
        own_values, own_ids = sent[:, head.rank]
        if best_rows:
            values, token_ids = pick(logits, best_rows).max(dim=-1)
            own_values[:num_best], own_ids[:num_best] = values, token_ids
        if top_rows:
            values, token_ids = pick(logits, top_rows).topk(NUM_SENT, dim=-1, sorted=False)
            own_values[num_best:], own_ids[num_best:] = values.flatten(), token_ids.flatten()
        own_ids += head.start
        sent = head.all_reduce(sent)
        best = top = None
        if best_rows:
            # Ranks have rising token ids: the first of equal logits has the lowest.
            values, owner = sent[0, :, :num_best].max(dim=0, keepdim=True)
            token_ids = sent[1, :, :num_best].gather(0, owner).long()
            best = Candidates(best_rows, values.T, token_ids.T)
        if top_rows:
            parts = sent[:, :, num_best:].unflatten(2, (num_top, NUM_SENT))
            all_values, all_ids = parts.transpose(1, 2).flatten(2)
            values, order = all_values.topk(NUM_SENT, dim=-1)
            top = Candidates(top_rows, values, all_ids.gather(1, order).long())
        return best, top


def pick(logits: Tensor, rows: list[int]) -> Tensor:
    """Some rows, ascending; no copy where they are all."""
    return logits if len(rows) == len(logits) else logits[rows]


def find_clear_rows(values: Tensor, num_top: Sequence[int]) -> list[int]:
    """Rows of which the candidates alone tell which logits are the `num_top` largest.

    They do not where the last of these equals one that is not among the candidates: what `topk`
    takes of equal logits of a whole row is its own affair.

    Args:
        values: [num_rows, NUM_SENT] float32, the largest first.
        num_top: [num_rows], from 1 to MAX_CANDIDATES.
    """
    # As the sampler computes them, whose division by the temperature rounds once more.
    below = values - values[:, :1]
    last = below.gather(1, torch.tensor(num_top)[:, None] - 1).squeeze(1)
    gap = last - below[:, -1]
    is_clear = (gap > CLEAR_SHARE * below[:, -1].abs()) & (gap > CLEAR_GAP)
    return is_clear.nonzero().flatten().tolist()

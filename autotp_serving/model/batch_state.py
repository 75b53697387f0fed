"""What a rank keeps of the running sequences from step to step. Every rank.

A batch says what has changed; `BatchState` holds the rest on the device: each row's block table
and latest tokens. Of both it makes `StepInputs`, by one copy from the host to the device. A little
longer than other files for two quicker ways, which a small model's step needs.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from autotp_serving.batch import Batch
from autotp_serving.model.stage import Stage
from autotp_serving.model.step_inputs import NOT_WRITTEN, StepInputs

FEW_TOKENS = 16
"""Up to so many that decode on a CPU, plain lists cost less than numpy, whose code the pass before
has driven out of the caches: about 5 % of a small model's step.
"""


class BatchState:
    """Persistent tensors with a row for each running sequence, and one for padding.

    Args:
        max_rows: most sequences in a step.
        max_blocks_per_row: blocks that the longest sequence fills.
        block_size: tokens a block holds.
        num_drafts: most tokens that are guessed ahead for a sequence in one step.

    Attributes:
        last_token_ids: [max_rows + 1, 1 + num_drafts] int64, the tokens sampled last.
        block_tables: [max_rows + 1, max_blocks_per_row] int32.
    """

    def __init__(
        self,
        max_rows: int,
        max_blocks_per_row: int,
        block_size: int,
        device: torch.device,
        num_drafts: int = 0,
    ) -> None:
        self._max_rows = max_rows
        self._block_size = block_size
        self.last_token_ids = torch.zeros(
            (max_rows + 1, 1 + num_drafts), dtype=torch.int64, device=device
        )
        self.block_tables = torch.zeros(
            (max_rows + 1, max_blocks_per_row), dtype=torch.int32, device=device
        )
        # Slots are computed on the host, which needs the tables as well. On a CPU they are one.
        self._tables = np.zeros(self.block_tables.shape, np.int32)
        if self.is_host:
            self._tables = self.block_tables.numpy()
        self._counts = np.arange(max_rows + 1)
        self._int_counts = self._counts.astype(np.int32)
        counts = torch.arange(FEW_TOKENS + 1)
        self._few_rows = [counts[:count] for count in range(FEW_TOKENS + 1)]
        self._few_starts = [counts[: count + 1].int() for count in range(FEW_TOKENS + 1)]
        self._stage = Stage(device)
        self._rows = torch.empty(0, dtype=torch.int32, device=device)  # of the latest step

    @property
    def is_host(self) -> bool:
        """Whether the tensors are in the host's memory."""
        return self.block_tables.is_cpu

    def apply(self, batch: Batch, num_padded_seqs: int = 0) -> StepInputs:
        """Take in what a batch changes, and make the inputs of its forward pass.

        Args:
            num_padded_seqs: fill a decode step up to so many sequences, for a graph of that size.
                The tensors of steps padded alike lie at the same addresses, if `reserve` was
                called for the largest.
        """
        grown = self._grow_tables(batch)
        if not num_padded_seqs and self._is_few(batch):
            return self._apply_few(batch)
        unknown = None
        token_ids: list[int] = batch.token_ids
        if len(token_ids) < sum(batch.query_lens):
            token_ids, unknown = _fill_gaps(batch)
        arrays, contexts = self._lay_out(batch, token_ids)
        chosen_rows = None
        if num_padded_seqs:
            if batch.score_rows or len(batch.sampled) < batch.num_seqs:
                chosen_rows = [*batch.sampled, *batch.score_rows]
            arrays = self._pad(arrays, num_padded_seqs - batch.num_seqs)
        # Last, so that it moves nothing of a padded step.
        arrays += [] if unknown is None else [unknown]
        tensors = self._stage.copy(arrays)
        tokens, positions, slots, logit_rows, rows, query_starts, context_lens = tensors[:7]
        if grown is not None:
            of_row, column, blocks = self._stage.send(grown)
            self.block_tables[of_row, column] = blocks.int()
        if unknown is not None:
            place, of_row, column = tensors[-1].view(3, -1)
            tokens[place] = self.last_token_ids[of_row, column]
        self._rows = rows
        return StepInputs(
            tokens,
            positions,
            slots,
            rows,
            query_starts,
            context_lens,
            self.block_tables,
            logit_rows,
            batch.query_lens,
            contexts,
            len(rows),
            len(tokens),
            chosen_rows,
            num_padded_seqs > 0,
        )

    def _is_few(self, batch: Batch) -> bool:
        """Whether `_apply_few` takes it: all decode, with drafts or without, and get a token, and
        the host knows all.
        """
        num_tokens = len(batch.token_ids)
        is_decode = num_tokens == batch.num_samples == sum(batch.query_lens)
        is_few = num_tokens <= FEW_TOKENS and len(batch.sampled) == len(batch.rows)
        return is_decode and is_few and self.is_host and not batch.score_rows

    def _apply_few(self, batch: Batch) -> StepInputs:
        """What `apply` makes of a few sequences that decode on a CPU."""
        size, tables = self._block_size, self._tables
        rows, positions, owners = batch.rows, batch.starts, batch.rows
        num_seqs, num_tokens = len(rows), len(batch.token_ids)
        query_starts = self._few_starts[num_seqs]
        contexts = [start + 1 for start in positions]
        if batch.num_drafts:
            lens = batch.query_lens
            contexts = [start + length for start, length in zip(batch.starts, lens, strict=True)]
            spans = list(map(range, batch.starts, contexts))
            positions = [position for span in spans for position in span]
            owners = [row for row, span in zip(rows, spans, strict=True) for _ in span]
            query_starts = torch.tensor(list(accumulate(lens, initial=0)), dtype=torch.int32)
        slots = [
            tables.item(row, position // size) * size + position % size
            for row, position in zip(owners, positions, strict=True)
        ]
        self._rows = torch.tensor(rows, dtype=torch.int32)
        return StepInputs(
            torch.tensor(batch.token_ids),
            torch.tensor(positions),
            torch.tensor(slots),
            self._rows,
            query_starts,
            torch.tensor(contexts, dtype=torch.int32),
            self.block_tables,
            self._few_rows[num_tokens],
            batch.query_lens,
            contexts,
            num_seqs,
            num_tokens,
        )

    def _lay_out(self, batch: Batch, token_ids: list[int]) -> tuple[list[np.ndarray], list[int]]:
        """The step's arrays in the order of `apply`, int64 before int32, and the contexts' lengths.

        Decode steps go a quicker way: on a small model this shows.
        """
        block_size = self._block_size
        num_seqs, num_tokens = len(batch.rows), len(token_ids)
        rows = np.array(batch.rows, np.int32)
        starts = np.array(batch.starts, np.int64)
        if num_tokens == num_seqs:
            contexts = [start + 1 for start in batch.starts]
            positions, owners = starts, rows
            query_starts = self._int_counts[: num_seqs + 1]
            if len(batch.sampled) == num_seqs and not batch.score_rows:
                logit_rows = self._counts[:num_seqs]
            else:
                logit_rows = np.array([*batch.sampled, *batch.score_rows], np.int64)
        else:
            lens = batch.query_lens
            contexts = [start + length for start, length in zip(batch.starts, lens, strict=True)]
            query_starts = np.zeros(num_seqs + 1, np.int32)
            np.cumsum(lens, out=query_starts[1:])
            owners = np.repeat(rows, lens)
            positions = np.arange(num_tokens) + np.repeat(starts - query_starts[:-1], lens)
            ends = query_starts.tolist()
            drafts = batch.num_drafts or [0] * num_seqs
            sampled = [
                row
                for index in batch.sampled
                for row in range(ends[index + 1] - 1 - drafts[index], ends[index + 1])
            ]
            logit_rows = np.array([*sampled, *batch.score_rows], np.int64)
        blocks = positions // block_size
        # block * size + offset, as position = own block * size + offset.
        slots = (self._tables[owners, blocks] - blocks) * block_size + positions
        context_lens = np.array(contexts, np.int32)
        tokens = np.array(token_ids, np.int64)
        arrays = [tokens, positions, slots, logit_rows, rows, query_starts, context_lens]
        return arrays, contexts

    def _pad(self, arrays: list[np.ndarray], count: int) -> list[np.ndarray]:
        """Add so many sequences that do nothing to a decode step's arrays."""
        tokens, positions, slots, _, rows, query_starts, context_lens = arrays
        num_seqs = len(rows)
        assert len(tokens) == num_seqs, "only decode steps are padded"
        last = np.arange(num_seqs, num_seqs + count)

        def extend(numbers: np.ndarray, more: int | np.ndarray) -> np.ndarray:
            return np.concatenate([numbers, np.broadcast_to(more, count).astype(numbers.dtype)])

        return [
            extend(tokens, 0),
            extend(positions, 0),
            extend(slots, NOT_WRITTEN),
            self._counts[: num_seqs + count],
            extend(rows, self._max_rows),
            extend(query_starts, last + 1),
            extend(context_lens, 0),
        ]

    def put_tokens(self, batch: Batch, token_ids: Tensor) -> None:
        """Keep the tokens that a batch's sequences got, for the steps after it.

        Args:
            token_ids: [num_samples, up to 1 + num_drafts] int64 on the device; an invalid one
                counts as token 0: its sequence ends.
        """
        if len(batch.sampled) == batch.num_seqs:
            index = self._rows[: batch.num_seqs]  # they are there already
        else:
            rows = np.asarray([[batch.rows[index] for index in batch.sampled]], np.int64)
            (index,) = self._stage.send(rows)
        self.last_token_ids[index, : token_ids.shape[1]] = token_ids.clamp(min=0)

    def _grow_tables(self, batch: Batch) -> np.ndarray | None:
        """Write new blocks into the host's tables; rows, columns and blocks [3, num_blocks]."""
        if not batch.grown:
            return None
        rows: list[int] = []
        columns: list[int] = []
        begin = 0
        for index, first, count in zip(
            batch.grown, batch.first_blocks, batch.num_new_blocks, strict=True
        ):
            row = batch.rows[index]
            self._tables[row, first : first + count] = batch.new_blocks[begin : begin + count]
            begin += count
            if not self.is_host:
                rows.extend([row] * count)
                columns.extend(range(first, first + count))
        return np.asarray([rows, columns, batch.new_blocks]) if rows else None

    def reserve(self, num_tokens: int, num_seqs: int) -> None:
        """Make the device's buffer large enough for steps of this size, once and for all."""
        self._counts = np.arange(num_seqs + 1)
        self._int_counts = self._counts.astype(np.int32)
        self._stage.reserve(8 * 4 * num_tokens + 4 * (6 * num_seqs + 1) + 8)


def _fill_gaps(batch: Batch) -> tuple[list[int], np.ndarray]:
    """Put 0 where a token was not sent.

    Returns:
        The tokens of the whole batch, and of the gaps [3 * num_gaps]: their places, and where in
        `last_token_ids` the tokens are, rows and columns.
    """
    token_ids: list[int] = []
    gaps: list[tuple[int, int, int]] = []
    taken = 0
    for row, query_len, num_known in zip(
        batch.rows, batch.query_lens, batch.num_known, strict=True
    ):
        token_ids.extend(batch.token_ids[taken : taken + num_known])
        taken += num_known
        for column in range(query_len - num_known):
            gaps.append((len(token_ids), row, column))
            token_ids.append(0)
    return token_ids, np.array(gaps, np.int32).T.ravel()

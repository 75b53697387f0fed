"""A step's integers on their way to a CUDA card: lists, pinned memory, persistent tensors.

Ranks on CUDA. Graphs are captured over the tensors of `StepBuffers`, whose addresses depend on
nothing but the batch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.plan import StepPlan


@dataclass(frozen=True)
class StepInputs:
    """What a forward pass and its attention read, on the device.

    Attributes:
        token_ids, positions, slots: [num_tokens] int64; slot -1 is not written.
        rows: [num_seqs] int32, into `block_tables`.
        query_starts: [num_seqs + 1] int32.
        context_lens: [num_seqs] int32, this step's tokens included; 0 for padding.
        block_tables: [max_rows, max_blocks] int32.
        logit_rows: [num_logit_rows] int64, or None: the first `num_seqs` tokens.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    logit_rows: Tensor | None
    num_seqs: int
    num_tokens: int
    max_query_len: int
    is_decode: bool


class StepBuffers:
    """Writes step plans to the card, one at a time."""

    def __init__(
        self, max_num_seqs: int, max_num_tokens: int, max_blocks: int, device: torch.device
    ) -> None:
        num_longs = 4 * max_num_tokens
        num_ints = 3 * max_num_seqs + 1
        self._tables: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._pinned_longs = torch.zeros(num_longs, dtype=torch.int64).pin_memory()
        self._pinned_ints = torch.zeros(num_ints, dtype=torch.int32).pin_memory()
        self._pinned_tables = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32).pin_memory()
        self._longs = torch.zeros(num_longs, dtype=torch.int64, device=device)
        self._ints = torch.zeros(num_ints, dtype=torch.int32, device=device)
        self._block_tables = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event()

    def write(self, plan: StepPlan, batch_size: int | None = None) -> StepInputs:
        """Start copying a plan to the card.

        Args:
            batch_size: pad a plan in which every sequence runs one token to so many.
        """
        num_seqs, num_tokens = len(plan.query_lens), len(plan.token_ids)
        padding = 0 if batch_size is None else batch_size - num_seqs
        logit_rows = [] if batch_size is not None else plan.logit_rows
        longs = [
            *(*plan.token_ids, *[0] * padding),
            *(*plan.positions, *[0] * padding),
            *(*plan.slots, *[-1] * padding),
            *logit_rows,
        ]
        query_lens = [*plan.query_lens, *[1] * padding]
        starts = [0]
        for query_len in query_lens:
            starts.append(starts[-1] + query_len)
        ints = [*range(len(query_lens)), *plan.context_lens, *[0] * padding, *starts]
        self._copied.synchronize()  # the last copy may still read the pinned memory
        self._pinned_longs[: len(longs)] = torch.tensor(longs)
        self._pinned_ints[: len(ints)] = torch.tensor(ints, dtype=torch.int32)
        tables_changed = self._write_tables(plan.block_tables)
        self._longs[: len(longs)].copy_(self._pinned_longs[: len(longs)], non_blocking=True)
        self._ints[: len(ints)].copy_(self._pinned_ints[: len(ints)], non_blocking=True)
        if tables_changed:
            part = slice(0, num_seqs)
            self._block_tables[part].copy_(self._pinned_tables[part], non_blocking=True)
        self._copied.record()
        num_logit_rows = None if batch_size is not None else len(logit_rows)
        return self.view(num_seqs + padding, num_tokens + padding, num_logit_rows, max(query_lens))

    def view(
        self, num_seqs: int, num_tokens: int, num_logit_rows: int | None, max_query_len: int
    ) -> StepInputs:
        """The tensors of a step of such a size."""
        longs, ints = self._longs, self._ints
        logit_rows = None
        if num_logit_rows is not None:
            logit_rows = longs[3 * num_tokens : 3 * num_tokens + num_logit_rows]
        return StepInputs(
            token_ids=longs[:num_tokens],
            positions=longs[num_tokens : 2 * num_tokens],
            slots=longs[2 * num_tokens : 3 * num_tokens],
            rows=ints[:num_seqs],
            query_starts=ints[2 * num_seqs : 3 * num_seqs + 1],
            context_lens=ints[num_seqs : 2 * num_seqs],
            block_tables=self._block_tables,
            logit_rows=logit_rows,
            num_seqs=num_seqs,
            num_tokens=num_tokens,
            max_query_len=max_query_len,
            is_decode=max_query_len == 1,
        )

    def _write_tables(self, tables: list[list[int]]) -> bool:
        """Put changed block tables into pinned memory; whether there were any."""
        changed = False
        for row, table in enumerate(tables):
            if table != self._tables[row]:
                self._tables[row] = table
                self._pinned_tables[row, : len(table)] = torch.tensor(table, dtype=torch.int32)
                changed = True
        return changed

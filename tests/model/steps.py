"""Inputs of a step from plain lists, by way of a batch and a rank's state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autotp_serving.batch import Batch
from autotp_serving.model.batch_state import BatchState
from autotp_serving.model.step_inputs import StepInputs

CPU = torch.device("cpu")


def make_batch(
    block_tables: Sequence[Sequence[int]],
    starts: Sequence[int],
    query_lens: Sequence[int],
    token_ids: Sequence[int] | None = None,
) -> Batch:
    """Sequences that all begin now, in rows from the last down, and get a token each."""
    num_seqs = len(starts)
    if token_ids is None:
        token_ids = [0] * sum(query_lens)
    return Batch(
        rows=list(range(num_seqs))[::-1],
        starts=list(starts),
        query_lens=list(query_lens),
        num_known=list(query_lens),
        token_ids=list(token_ids),
        grown=list(range(num_seqs)),
        first_blocks=[0] * num_seqs,
        num_new_blocks=[len(table) for table in block_tables],
        new_blocks=[block for table in block_tables for block in table],
        sampled=list(range(num_seqs)),
    )


def make_inputs(
    block_tables: Sequence[Sequence[int]],
    starts: Sequence[int],
    query_lens: Sequence[int],
    block_size: int = 16,
    token_ids: Sequence[int] | None = None,
) -> StepInputs:
    """The inputs of `make_batch`'s step."""
    state = BatchState(len(starts), max(map(len, block_tables)), block_size, CPU)
    return state.apply(make_batch(block_tables, starts, query_lens, token_ids))

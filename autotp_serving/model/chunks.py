"""Attention within chunks of a sequence: the step as one over pieces of sequences. Every rank.

In chunked attention (Llama 4) a token sees those before it in its own chunk, and chunks start at
multiples of their length. As blocks lie in one chunk each, the part of a sequence in a chunk is a
sequence of its own for the kernels, which need not know of chunks.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch

from autotp_serving.model.step_inputs import StepInputs


def split_by_chunks(inputs: StepInputs, chunk_len: int, block_size: int) -> StepInputs:
    """The same tokens, as sequences that begin with the chunk of their first token.

    Args:
        inputs: without padding.
        chunk_len: tokens of a chunk, a multiple of `block_size`.
    """
    sequences, first_blocks, query_lens, context_lens = [], [], [], []
    for index, (query_len, context_len) in enumerate(
        zip(inputs.host_query_lens, inputs.host_context_lens, strict=True)
    ):
        start = context_len - query_len
        while start < context_len:
            chunk_start = start - start % chunk_len
            stop = min(context_len, chunk_start + chunk_len)
            sequences.append(index)
            first_blocks.append(chunk_start // block_size)
            query_lens.append(stop - start)
            context_lens.append(stop - chunk_start)
            start = stop
    device, tables = inputs.slots.device, inputs.block_tables
    width = -(-max(context_lens) // block_size)
    columns = torch.tensor(first_blocks, device=device)[:, None]
    columns = columns + torch.arange(width, device=device)
    rows = inputs.rows.long()[torch.tensor(sequences, device=device)]
    starts = list(accumulate(query_lens, initial=0))
    return replace(
        inputs,
        rows=torch.arange(len(sequences), dtype=torch.int32, device=device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        # Columns behind a row's end belong to no context.
        block_tables=tables[rows[:, None], columns.clamp(max=tables.shape[1] - 1)].contiguous(),
        host_query_lens=query_lens,
        host_context_lens=context_lens,
        num_seqs=len(sequences),
    )

"""What a forward pass and attention read of one step. Every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

NOT_WRITTEN = -1
"""The slot of a padding token: attention stores nothing for it."""


@dataclass(slots=True)
class StepInputs:
    """What a forward pass and attention read of one step. Tensors are on the device.

    Attributes:
        token_ids: [num_tokens] int64, the sequences' tokens one after another.
        positions: [num_tokens] int64, of each in its sequence.
        slots: [num_tokens] int64, block * block_size + offset: where its key and value go;
            NOT_WRITTEN for padding.
        rows: [num_seqs] int32, each sequence's row of `block_tables`.
        query_starts: [num_seqs + 1] int32, where each sequence's tokens begin.
        context_lens: [num_seqs] int32, tokens in the cache once this step's are there; 0 for
            padding, whose output is zeros.
        block_tables: [max_rows + 1, max_blocks_per_row] int32, of all rows; what lies behind a
            context means nothing.
        logit_rows: [num_logit_rows] int64, indices of the tokens whose logits rank 0 needs: those
            of the sequences that get a token, in order, then those that score prompts. In a padded
            step all tokens, so that its tensors have the same places whatever is sampled.
        adapters: [num_seqs], slots of adapters, 0 for none; [] where none has one.
        is_padded: whether a decode step was made ready for a graph, even if nothing was added.
        chosen_rows: in a padded step, which of `logit_rows` these are; None: the first, as many as
            there are sequences without padding.
        host_query_lens, host_context_lens: [num_seqs], the same on the host, without padding.
        num_seqs, num_tokens: with padding.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    rows: Tensor
    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    logit_rows: Tensor
    host_query_lens: list[int]
    host_context_lens: list[int]
    num_seqs: int
    num_tokens: int
    chosen_rows: list[int] | None = None
    is_padded: bool = False
    adapters: list[int] = field(default_factory=list)

    @property
    def is_decode(self) -> bool:
        """True when every sequence runs one token."""
        return self.num_tokens == self.num_seqs

    @property
    def max_query_len(self) -> int:
        """Most tokens that a sequence runs."""
        return max(self.host_query_lens, default=1)

    @property
    def max_context_len(self) -> int:
        """Longest context."""
        return max(self.host_context_lens, default=0)

    @staticmethod
    def of_prompts(prompts: Sequence[Sequence[int]], device: torch.device) -> StepInputs:
        """Whole prompts with neither cache nor rows, and the logits of all their tokens: for
        trials before there are any. All slots are 0.
        """
        lens = [len(prompt) for prompt in prompts]
        num_tokens = sum(lens)

        def ints(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=device)

        def longs(values: Iterable[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int64, device=device)

        return StepInputs(
            token_ids=longs(token for prompt in prompts for token in prompt),
            positions=longs(position for length in lens for position in range(length)),
            slots=longs([0] * num_tokens),
            rows=ints(range(len(lens))),
            query_starts=ints(accumulate(lens, initial=0)),
            context_lens=ints(lens),
            block_tables=torch.zeros((len(lens), max(lens)), dtype=torch.int32, device=device),
            logit_rows=longs(range(num_tokens)),
            host_query_lens=lens,
            host_context_lens=lens,
            num_seqs=len(lens),
            num_tokens=num_tokens,
        )

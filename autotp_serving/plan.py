"""The step plan: all that crosses from rank 0 to the other ranks, and the runner that obeys it.

Standard library only. Rank 0 writes a plan each step, every rank turns it into tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from autotp_serving.request import SamplingParams, TokenLogprobs
from autotp_serving.step_times import RankTimes

INVALID_TOKEN = -1
"""Stands for the token of a row whose logits were NaN or infinite."""

MAX_SCORED_ROWS = 256
"""Most rows of one step whose logits serve prompt logprobs: each costs a vocabulary of memory."""


@dataclass(frozen=True)
class StepPlan:
    """One forward pass over a flattened batch of sequences, in plain integers.

    Sequence i runs `query_lens[i]` tokens; with them its context reaches `context_lens[i]`
    tokens, whose keys and values live in the pages `block_tables[i]`.

    Attributes:
        token_ids: [num_tokens], the sequences' tokens one after another.
        positions: [num_tokens], position of each token in its sequence.
        slots: [num_tokens], where its key and value go: page * block_size + offset.
        query_lens: [num_seqs], at least 1 each; they sum to num_tokens.
        context_lens: [num_seqs], tokens in the cache once this step is done.
        block_tables: [num_seqs] lists of pages that cover `context_lens`.
        logit_rows: indices into `token_ids` whose logits rank 0 needs: those of the sequences
            that get a token, in order, then those of prompt tokens to be scored.
    """

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    query_lens: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    logit_rows: list[int]

    def to_bytes(self) -> bytes:
        """Pack into native 32-bit integers: three counts, then the lists in field order."""
        packed = array("i", [len(self.token_ids), len(self.query_lens), len(self.logit_rows)])
        for values in (self.token_ids, self.positions, self.slots):
            packed.extend(values)
        packed.extend(self.query_lens)
        packed.extend(self.context_lens)
        packed.extend(len(table) for table in self.block_tables)
        for table in self.block_tables:
            packed.extend(table)
        packed.extend(self.logit_rows)
        return packed.tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> StepPlan:
        """Inverse of `to_bytes`, on a machine of the same byte order."""
        packed = array("i")
        packed.frombytes(data)
        values = packed.tolist()
        num_tokens, num_seqs, num_rows = values[:3]
        cursor = 3

        def take(count: int) -> list[int]:
            nonlocal cursor
            cursor += count
            return values[cursor - count : cursor]

        token_ids, positions, slots = take(num_tokens), take(num_tokens), take(num_tokens)
        query_lens, context_lens, table_lens = take(num_seqs), take(num_seqs), take(num_seqs)
        block_tables = [take(table_len) for table_len in table_lens]
        return StepPlan(
            token_ids, positions, slots, query_lens, context_lens, block_tables, take(num_rows)
        )


@dataclass(frozen=True, slots=True)
class SampleInput:
    """What rank 0 needs, beside the logits, to choose the next token of one sequence.

    Attributes:
        params: the request's sampling parameters.
        uniform: a number in [0, 1) drawn from the request's own seeded stream, one per output
            position, so that the choice does not depend on what else is in the batch.
        request_id: under which the runner keeps what it counts for the request.
        token_ids: prompt and output so far, read where penalties ask for it.
        num_prompt_tokens: how many of them are the prompt.
        banned: tokens that must not be chosen now.
        allowed: the only tokens that may be chosen, as `Guide.allowed` packs them; None: all.
    """

    params: SamplingParams
    uniform: float = 0.0
    request_id: str = ""
    token_ids: Sequence[int] = ()
    num_prompt_tokens: int = 0
    banned: tuple[int, ...] = ()
    allowed: bytes | None = None

    @property
    def is_plain(self) -> bool:
        """True when the row's largest logit is the answer."""
        return self.params.is_plain and self.allowed is None


@dataclass(frozen=True, slots=True)
class ScoreInput:
    """Rows of one prompt whose next tokens are known and are to be scored.

    Attributes:
        target_ids: [num_rows], the token that follows each row.
        num_top: likeliest tokens to list for each.
    """

    target_ids: list[int]
    num_top: int


@dataclass(frozen=True, slots=True)
class StepResult:
    """What rank 0 makes of a step's logits.

    Attributes:
        token_ids: [num_samples], INVALID_TOKEN for a row whose logits were not finite.
        logprobs: [num_samples], None for rows that did not ask; empty when none did.
        scores: [num_scores] lists of the targets' logprobs.
    """

    token_ids: list[int]
    logprobs: Sequence[TokenLogprobs | None] = ()
    scores: Sequence[list[TokenLogprobs]] = ()


class Runner(Protocol):
    """Runs a plan on all ranks; the engine knows nothing else of the model.

    Attributes:
        num_blocks: pages in the KV pool, the same on every rank.
        block_size: tokens a page holds.
        rank_times: [num_ranks], what the steps have cost each rank so far.
    """

    num_blocks: int
    block_size: int
    rank_times: Sequence[RankTimes]

    def execute(
        self,
        plan: StepPlan,
        samples: Sequence[SampleInput],
        scores: Sequence[ScoreInput] = (),
    ) -> StepResult:
        """Run one step. `plan.logit_rows` holds a row for each sample, then those of the scores."""
        ...

    def release(self, request_id: str) -> None:
        """Forget what is kept for a request. Every request that was sampled ends with this."""
        ...

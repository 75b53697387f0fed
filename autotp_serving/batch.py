"""The batch of a step: all that crosses from rank 0 to the other ranks, and who runs it.

Standard library only. Rank 0 writes a batch each step, every rank turns it into tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from autotp_serving.block_transfer import BlockTransfer
from autotp_serving.request import Pooling, SamplingParams, TokenLogprobs
from autotp_serving.step_times import RankTimes

INVALID_TOKEN = -1
"""Stands for the token of a row whose logits were NaN or infinite."""

MAX_SCORED_ROWS = 256
"""Most rows of one step whose logits serve prompt logprobs: each costs a vocabulary of memory."""


@dataclass(slots=True)
class Batch:
    """One forward pass over a flattened batch of sequences, in plain integers.

    A running sequence owns a row, in which every rank keeps the sequence's block table and latest
    tokens from step to step, so a batch holds only what a rank cannot know: positions, slots and
    cumulative lengths are computed by each.

    Attributes:
        rows: [num_seqs], each sequence's row, from 0 to the most sequences of a step - 1.
        starts: [num_seqs], tokens in the cache before this step: the first token's position.
        query_lens: [num_seqs], how many tokens each runs, at least 1.
        num_known: [num_seqs], how many of them are sent, from the first on. One that is not was
            sampled by a step whose result is not here yet: the rank has it in its row.
        token_ids: those that are sent, the sequences' one after another.
        grown: [num_grown], indices of the sequences whose block tables change, in order.
        first_blocks: [num_grown], where in its table the new blocks go; 0 begins a new table.
        num_new_blocks: [num_grown], how many there are of each.
        new_blocks: theirs, one after another.
        sampled: indices of the sequences that get a token, in order. A sample is chosen behind
            each's last token, and behind each of its drafts and the token before the first.
        num_top: [num_samples], how many of the largest logits are enough to choose each token; 0
            where all are needed; [] where the largest is enough for each.
        score_rows: indices into the flattened tokens whose logits score the prompt, or whose
            hidden states are pooled: a model does one of both.
        num_drafts: [num_seqs], how many of a sequence's last tokens are guesses; [] for none. Only
            sequences that are sampled have some.
        adapters: [num_seqs], slots of adapters, 0 for none; [] where none has one.
        state_copies: rows of the states that layers keep beside the blocks, in pairs: before the
            step, and in this order, the first one's states are copied to the second.
    """

    rows: list[int]
    starts: list[int]
    query_lens: list[int]
    num_known: list[int]
    token_ids: list[int]
    grown: list[int] = field(default_factory=list)
    first_blocks: list[int] = field(default_factory=list)
    num_new_blocks: list[int] = field(default_factory=list)
    new_blocks: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    num_top: list[int] = field(default_factory=list)
    score_rows: list[int] = field(default_factory=list)
    num_drafts: list[int] = field(default_factory=list)
    adapters: list[int] = field(default_factory=list)
    state_copies: list[int] = field(default_factory=list)

    @property
    def num_seqs(self) -> int:
        """Sequences that take part."""
        return len(self.rows)

    @property
    def num_samples(self) -> int:
        """Tokens that are chosen, those behind drafts among them."""
        return len(self.sampled) + sum(self.num_drafts)

    @property
    def is_decode(self) -> bool:
        """True when every sequence runs a single token."""
        return max(self.query_lens) == 1

    def spread_drafts(self) -> Batch:
        """The same tokens with each draft as a sequence of one token, in its sequence's row.

        Kernels for sequences that decode verify drafts so, if keys and values of all tokens of a
        step are stored before any attends to them.
        """
        if not self.num_drafts:
            return self
        spread = replace(self, rows=[], starts=[], query_lens=[], sampled=[], num_drafts=[])
        places, adapters = [], []
        is_sampled = set(self.sampled)
        for index, num_drafts in enumerate(self.num_drafts):
            place, start = len(spread.rows), self.starts[index]
            end = start + self.query_lens[index]
            places.append(place)
            if index in is_sampled:
                spread.sampled += range(place, place + 1 + num_drafts)
            spread.rows += [self.rows[index]] * (1 + num_drafts)
            spread.starts += [start, *range(end - num_drafts, end)]
            spread.query_lens += [end - num_drafts - start, *[1] * num_drafts]
            adapters += self.adapters[index : index + 1] * (1 + num_drafts)
        grown = [places[index] for index in self.grown]
        return replace(spread, num_known=spread.query_lens, grown=grown, adapters=adapters)

    def to_bytes(self) -> bytes:
        """Pack into native 32-bit integers: counts, then the lists; the commonest take no room."""
        num_seqs = len(self.rows)
        ones = [1] * num_seqs
        # Of decode steps these follow from the others.
        query_lens = [] if self.query_lens == ones else self.query_lens
        num_known = [] if self.num_known == self.query_lens else self.num_known
        sampled = [] if self.sampled == list(range(num_seqs)) else self.sampled
        chosen = (sampled, self.num_top, self.num_drafts, self.adapters)
        lists = (query_lens, num_known, *chosen, self.state_copies)
        counts = [num_seqs, len(self.token_ids), len(self.grown), len(self.new_blocks)]
        counts += [len(self.score_rows), len(self.sampled), *map(len, lists)]
        packed = array("i", counts)
        for values in (self.rows, self.starts, *lists, self.token_ids, self.grown):
            packed.extend(values)
        for values in (self.first_blocks, self.num_new_blocks, self.new_blocks, self.score_rows):
            packed.extend(values)
        return packed.tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> Batch:
        """Inverse of `to_bytes`, on a machine of the same byte order."""
        packed = array("i")
        packed.frombytes(data)
        values = packed.tolist()
        num_seqs, num_ids, num_grown, num_blocks, num_scored, num_sampled = values[:6]
        num_lens, num_counts, num_listed, num_top, num_drafts, num_adapters = values[6:12]
        num_copies, cursor = values[12], 13

        def take(count: int) -> list[int]:
            nonlocal cursor
            cursor += count
            return values[cursor - count : cursor]

        rows, starts = take(num_seqs), take(num_seqs)
        query_lens = take(num_lens) or [1] * num_seqs
        num_known = take(num_counts) or list(query_lens)
        sampled = take(num_listed) or list(range(num_sampled))
        top, drafts, adapters = take(num_top), take(num_drafts), take(num_adapters)
        state_copies = take(num_copies)
        return Batch(
            rows,
            starts,
            query_lens,
            num_known,
            token_ids=take(num_ids),
            grown=take(num_grown),
            first_blocks=take(num_grown),
            num_new_blocks=take(num_grown),
            new_blocks=take(num_blocks),
            sampled=sampled,
            num_top=top,
            score_rows=take(num_scored),
            num_drafts=drafts,
            adapters=adapters,
            state_copies=state_copies,
        )


@dataclass(frozen=True, slots=True)
class SampleInput:
    """What rank 0 needs, beside the logits, to choose the next token of one sequence.

    Attributes:
        params: the request's sampling parameters.
        uniform: a number in [0, 1) that depends on the request's seed and the output position
            alone, so that the choice does not depend on what else is in the batch.
        request_id: under which the runner keeps what it counts for the request.
        token_ids: prompt and output so far, read where penalties ask for it.
        num_prompt_tokens: how many of them are the prompt.
        banned: tokens that must not be chosen now.
        allowed: the only tokens that may be chosen, as `Guide.allowed` packs them; None: all.
        drafts: guesses between `token_ids` and this token, given where penalties ask for it.
    """

    params: SamplingParams
    uniform: float = 0.0
    request_id: str = ""
    token_ids: Sequence[int] = ()
    num_prompt_tokens: int = 0
    banned: tuple[int, ...] = ()
    allowed: bytes | None = None
    drafts: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """True when the row's largest logit is its token."""
        return self.params.is_plain and self.allowed is None


@dataclass(frozen=True, slots=True)
class DraftInput:
    """How the draft model is to guess tokens of one sequence.

    Attributes:
        uniforms: [num_drafts], the numbers with which the model itself will choose there: drawn
            alike, two distributions that are near each other mostly give the same token.
        temperature, top_k, top_p, min_p: see SamplingParams.
    """

    uniforms: tuple[float, ...]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class ScoreInput:
    """Rows of one prompt whose next tokens are known and are to be scored.

    Attributes:
        target_ids: [num_rows], the token that follows each row.
        num_top: most likely tokens to list for each.
    """

    target_ids: list[int]
    num_top: int


@dataclass(frozen=True, slots=True)
class PoolInput:
    """Rows of one prompt that are pooled, all of them or those of one chunk.

    Attributes:
        request_id: under which the sum of a mean is kept from chunk to chunk.
        pooling: what to make of them.
        num_rows: how many these are.
        num_tokens: of the whole prompt.
        is_first, is_last: whether others came before, or come after.
    """

    request_id: str
    pooling: Pooling
    num_rows: int
    num_tokens: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class StepResult:
    """What rank 0 makes of a step's logits.

    Attributes:
        token_ids: for each of the batch's `sampled` the tokens that were chosen: one, and one
            more for each draft that was accepted; INVALID_TOKEN alone if logits were not finite.
        logprobs: for each a list of their logprobs, None for those that did not ask; empty when
            none did.
        scores: [num_scores] lists of the targets' logprobs.
        pooled: [num_pools] vectors of float32 as bytes; b"" for one that is not finite, None where
            more chunks follow.
    """

    token_ids: list[list[int]]
    logprobs: Sequence[list[TokenLogprobs] | None] = ()
    scores: Sequence[list[TokenLogprobs]] = ()
    pooled: Sequence[bytes | None] = ()


class RunnerLost(ConnectionError):
    """The ranks are gone with all that they held; others may take their place."""


class Runner(Protocol):
    """Runs batches on all ranks; the engine knows nothing else of the model.

    A step is `forward`, then `sample`, and later `collect`. Steps run in the order of `forward`;
    the next may begin before the last is collected, as long as at most `max_in_flight` are under
    way.

    Attributes:
        num_blocks: blocks in the KV pool, the same on every rank.
        block_size: tokens a block holds.
        max_in_flight: steps that may be begun and not collected, at least 1.
        has_states: whether layers keep states beside the blocks.
        can_draft: whether batches may hold drafts.
        stored_blocks: (slot, key) of each slot for blocks beyond the pool, as the ranks found them,
            the next to be written first; an empty slot has no key. Empty without such files.
        rank_times: [num_ranks], what the steps have cost each rank so far.
    """

    num_blocks: int
    block_size: int
    max_in_flight: int
    has_states: bool
    can_draft: bool
    stored_blocks: Sequence[tuple[int, bytes]]

    @property
    def rank_times(self) -> Sequence[RankTimes]:
        """See above."""
        ...

    def forward(self, batch: Batch) -> None:
        """Begin a step on all ranks: its logits."""
        ...

    def sample(
        self,
        samples: Sequence[SampleInput],
        scores: Sequence[ScoreInput] = (),
        pools: Sequence[PoolInput] = (),
    ) -> None:
        """Begin to choose and score from the logits of the batch that was forwarded last, or to
        pool its hidden states.

        Args:
            samples: one for each of the batch's `sampled`, and for each of its drafts.
            scores, pools: of the batch's `score_rows`, all of them together.
        """
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest step in flight."""
        ...

    def draft(self, batch: Batch, drafts: Sequence[DraftInput]) -> list[list[int]]:
        """Have the draft model read tokens and guess those after them, on all ranks, before the
        next step.

        Args:
            batch: tokens that it has not read, of each sequence in the blocks of its table; the
                `sampled` ones with all of theirs.
            drafts: one for each of the batch's `sampled`.

        Returns:
            Up to as many tokens of each as were asked for.
        """
        ...

    def transfer(self, transfer: BlockTransfer) -> list[int]:
        """Move blocks between the pool and the files, on all ranks, before the next step.

        Returns:
            Indices of its loads that failed on any rank.
        """
        ...

    def load_adapter(self, slot: int, path: str) -> None:
        """Have every rank take an adapter's folder into a slot, from 1 on; no step is in flight.

        Raises:
            AdapterError: the folder is not served; nothing has changed.
        """
        ...

    def drop_adapter(self, slot: int) -> None:
        """Have every rank forget what is in a slot; no step in flight uses it."""
        ...

    def release(self, request_id: str) -> None:
        """Forget what is kept for a request. Every request that was sampled ends with this."""
        ...

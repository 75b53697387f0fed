"""A request while it runs: its tokens, its row, its blocks, its samples. Rank 0 only."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from autotp_serving.batch import SampleInput
from autotp_serving.request import FinishReason, Request, SamplingParams, TokenLogprobs
from autotp_serving.structured_output import Grammar, Guide

if TYPE_CHECKING:
    from autotp_serving.engine.drafts import DraftHistory

NO_ROW = -1

MASK_64 = 2**64 - 1

UNFOLLOWABLE = (
    "the structured output cannot be followed in this completion: make it simpler, or see the "
    "server's log"
)

logger = logging.getLogger(__name__)


class GuardedGuide:
    """A guide of whose faults the completion that it follows ends, and nothing else. See Guide."""

    def __init__(self, grammar: Grammar) -> None:
        self._guide: Guide | None = None
        """None after a fault."""
        try:
            self._guide = grammar.start()
        except BaseException as error:
            self._note_fault(error)

    @property
    def error(self) -> str | None:
        """See Guide."""
        return UNFOLLOWABLE if self._guide is None else self._guide.error

    @property
    def is_ready(self) -> bool:
        """See Guide."""
        return self._guide is None or self._guide.is_ready

    def allowed(self, num_ahead: int = 0) -> bytes | None:
        """See Guide; None after a fault too, of which `error` tells."""
        if self._guide is None:
            return None
        try:
            return self._guide.allowed(num_ahead)
        except BaseException as error:
            self._note_fault(error)
            return None

    def look_ahead(self, guesses: list[int], limit: int) -> list[int]:
        """See Guide; nothing after a fault."""
        if self._guide is None:
            return []
        try:
            return self._guide.look_ahead(guesses, limit)
        except BaseException as error:
            self._note_fault(error)
            return []

    def wait(self, seconds: float) -> None:
        """See Guide."""
        if self._guide is not None:
            self._guide.wait(seconds)

    def accept(self, token_id: int) -> bool:
        """See Guide; False after a fault."""
        if self._guide is None:
            return False
        try:
            return self._guide.accept(token_id)
        except BaseException as error:
            self._note_fault(error)
            return False

    def _note_fault(self, error: BaseException) -> None:
        """Follow no further. A panic of a library in Rust is a fault too, and no Exception."""
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise error
        logger.error("a structured output cannot be followed", exc_info=error)
        self._guide = None


@dataclass(eq=False, slots=True)
class Sequence:
    """The changing half of a `Request`; the scheduler owns it, nobody else changes it.

    Attributes:
        request: what was asked, never changed.
        draw_key: what its samples depend on beside the output position; see `draw_uniform`.
        end_token_ids: tokens that end the text.
        priority: lower ones run earlier and are preempted later; see `PriorityQueue`.
        token_ids: prompt, then output.
        block_table: blocks that hold or will hold keys and values, in order of position.
        row: where the ranks keep its block table and latest tokens; NO_ROW unless it runs.
        num_sent_blocks: leading blocks of the table that the ranks know.
        num_scheduled_tokens: tokens that run in the steps begun so far, or are in the cache.
        num_computed_tokens: those of them whose keys and values are known to be in the blocks.
        num_pending_tokens: tokens sampled by steps that are begun and not collected.
        last_step: number of the step that it took part in last.
        num_registered_blocks: leading blocks that others may reuse.
        state_ends: after so many tokens its state is to be kept, ascending.
        num_cached_tokens: prompt tokens found in the prefix cache when it first began to run.
        queue_seconds: how long it waited before it first began to run.
        num_preemptions: how often it lost its blocks and started over.
        num_losses: how often the ranks were lost in its step since it last got a token.
        len_at_loss: how many tokens it had then.
        drafts: what became of its drafts; None before its first step that could have some.
        guide: follows the completion through its structured output; None without one.
        prompt_logprobs: of the prompt's tokens after the first, as far as they are computed.
        pooled: what was made of the prompt's hidden states; see RequestOutput.
        finish_reason: None while it waits or runs.
        ends_in_text: False when the last token only marked the end.
        error: one sentence, with `finish_reason` "error".
        error_code: a word for programs beside it, where it is not the engine's own failure.
    """

    request: Request
    draw_key: int
    end_token_ids: frozenset[int] = frozenset()
    token_ids: list[int] = field(init=False)
    priority: float = field(init=False)
    block_table: list[int] = field(default_factory=list)
    row: int = NO_ROW
    num_sent_blocks: int = 0
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    last_step: int = 0
    num_registered_blocks: int = 0
    state_ends: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    queue_seconds: float = 0.0
    num_preemptions: int = 0
    num_losses: int = 0
    len_at_loss: int = 0
    drafts: DraftHistory | None = None
    guide: GuardedGuide | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: bytes = b""
    finish_reason: FinishReason | None = None
    ends_in_text: bool = True
    error: str | None = None
    error_code: str | None = None
    _plain_sample: SampleInput | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.priority = self.request.priority
        if self.request.grammar is not None:
            self.guide = GuardedGuide(self.request.grammar)
        assert self.num_prompt_tokens >= 1 and self.params.max_tokens >= 0
        assert all(token >= 0 for token in self.token_ids)

    @property
    def request_id(self) -> str:
        """The request's identity."""
        return self.request.request_id

    @property
    def params(self) -> SamplingParams:
        """How to sample and when to stop."""
        return self.request.params

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_unscheduled_tokens(self) -> int:
        """Tokens, pending ones included, that must yet run before another can be sampled."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_scheduled_tokens

    @property
    def is_ready(self) -> bool:
        """True when a token can be sampled as soon as there are logits.

        While one is pending, that is so where another may follow and is chosen without knowing it.
        """
        if self.num_pending_tokens:
            num_tokens = self.num_output_tokens + self.num_pending_tokens
            is_free = self.guide is None and not self.params.has_penalties
            return is_free and num_tokens < self.params.max_tokens
        return self.guide is None or self.guide.is_ready

    def make_sample(self, drafts: Iterable[int] = ()) -> SampleInput:
        """What the sampler needs for the next token; takes the guide's mask, if there is one.

        Args:
            drafts: tokens that are guessed to come before it.
        """
        params, drafts = self.params, tuple(drafts)
        if params.is_plain and self.guide is None:
            if self._plain_sample is None:
                self._plain_sample = SampleInput(
                    params, 0.0, self.request_id, self.token_ids, self.num_prompt_tokens
                )
            return self._plain_sample
        position = self.num_output_tokens + self.num_pending_tokens + len(drafts)
        return SampleInput(
            params,
            draw_uniform(self.draw_key, position),
            self.request_id,
            self.token_ids,
            self.num_prompt_tokens,
            tuple(self.end_token_ids) if position < params.min_tokens else (),
            None if self.guide is None else self.guide.allowed(len(drafts)),
            drafts if params.has_penalties else (),
        )

    @property
    def num_unscored_tokens(self) -> int:
        """Prompt tokens whose logprobs are asked for and not known yet."""
        if self.params.prompt_logprobs is None:
            return 0
        return self.num_prompt_tokens - 1 - len(self.prompt_logprobs)


def make_draw_key(seed: int | None, server_seed: int, index: int) -> int:
    """The 64 bits that a request's samples depend on: its own seed's, or else the server's and its
    number's, so that near seeds have nothing in common.
    """
    if seed is not None:
        text = f"request seed {seed}"
    else:
        text = f"server seed {server_seed}, request {index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def draw_uniform(key: int, position: int) -> float:
    """A request's sample for one output position, in [0, 1) with 53 bits.

    A function of the two rather than a stream: preemption, drafts and steps in flight may ask
    again or ahead. This is SplitMix64 (Steele, Lea and Flood 2014), whose state is a counter.
    """
    bits = (key + (position + 1) * 0x9E3779B97F4A7C15) & MASK_64
    bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & MASK_64
    bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & MASK_64
    return ((bits ^ bits >> 31) >> 11) * 2.0**-53

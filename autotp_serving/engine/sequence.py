"""A request while it runs: its tokens, its pages, its random stream. Rank 0 only."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field

from autotp_serving.request import FinishReason, Request, SamplingParams, TokenLogprobs
from autotp_serving.structure import Guide

logger = logging.getLogger(__name__)


class GuardedGuide:
    """A guide of whose faults the answer that it follows ends, and nothing else. See Guide."""

    def __init__(self, guide: Guide) -> None:
        self._guide = guide
        self._fault: str | None = None

    @property
    def error(self) -> str | None:
        """See Guide."""
        return self._fault or self._guide.error

    @property
    def is_ready(self) -> bool:
        """See Guide."""
        return self._fault is not None or self._guide.is_ready

    def allowed(self) -> bytes | None:
        """See Guide; None after a fault, of which `error` tells."""
        try:
            return None if self._fault else self._guide.allowed()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of a library in Rust is no Exception
            return self._note_fault()

    def accept(self, token_id: int) -> bool:
        """See Guide."""
        try:
            return self._fault is None and self._guide.accept(token_id)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            self._note_fault()
            return False

    def _note_fault(self) -> None:
        logger.exception("a structure cannot be followed")
        self._fault = "the structure cannot be followed; see the server's log"


@dataclass(eq=False, slots=True)
class Sequence:
    """The changing half of a `Request`; the scheduler owns it, nobody else changes it.

    Attributes:
        request: what was asked, never changed.
        uniforms: the request's own stream of draws in [0, 1), one per output position.
        end_token_ids: tokens that end the text.
        token_ids: prompt, then output.
        block_table: pages that hold or will hold keys and values, in order of position.
        num_computed_tokens: tokens whose keys and values are in the pages.
        num_registered_blocks: leading pages that others may reuse.
        num_cached_tokens: prompt tokens found in the prefix cache when it first began to run.
        queue_seconds: how long it waited before it first began to run.
        num_preemptions: how often it lost its pages and started over.
        guide: follows the answer through the structure it must have; None without one.
        prompt_logprobs: of the prompt's tokens after the first, as far as they are computed.
        finish_reason: None while it waits or runs.
        ends_in_text: False when the last token only marked the end.
        error: one sentence, with `finish_reason` "error".
    """

    request: Request
    uniforms: random.Random
    end_token_ids: frozenset[int] = frozenset()
    token_ids: list[int] = field(init=False)
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_registered_blocks: int = 0
    num_cached_tokens: int = 0
    queue_seconds: float = 0.0
    num_preemptions: int = 0
    guide: GuardedGuide | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    ends_in_text: bool = True
    error: str | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        if self.request.grammar is not None:
            self.guide = GuardedGuide(self.request.grammar.start())
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
    def num_uncomputed_tokens(self) -> int:
        """Tokens that still have to run before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_ready(self) -> bool:
        """True when a token can be sampled as soon as there are logits."""
        return self.guide is None or self.guide.is_ready

    @property
    def num_unscored_tokens(self) -> int:
        """Prompt tokens whose logprobs are asked for and not known yet."""
        if self.params.prompt_logprobs is None:
            return 0
        return self.num_prompt_tokens - 1 - len(self.prompt_logprobs)


def make_stream(seed: int | None, server_seed: int, index: int) -> random.Random:
    """Make a request's stream of draws from its own seed, or else the server's and its number.

    Text seeds, because `Random(-1)` and `Random(1)` are the same stream.
    """
    if seed is not None:
        return random.Random(f"request seed {seed}")
    return random.Random(f"server seed {server_seed}, request {index}")

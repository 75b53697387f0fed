"""How much of a prompt runs beside those that stream, by what steps have taken. Rank 0 only."""

from __future__ import annotations

from autotp_serving.engine.batch_builder import Step

FIRST_CHUNK = 64
"""Tokens of a prompt beside others, before any step has shown what they take."""

CHUNK_UNIT = 16
"""Chunks are multiples of what the kernels multiply together, and at least that: a prompt gets on
even where decoding alone takes as long as a step may."""

DECODE_SHARE = 1 / 8
PREFILL_SHARE = 1 / 2
"""By which a new step moves what decoding takes, and what a token of a prompt takes: that grows
with the tokens before it, so that the last step says most."""


class StepPace:
    """Finds how many tokens of prompts a step may have, so that it ends in time.

    A step is taken to last as long as one that only decodes, and so long for each token of a
    prompt as in the last steps that had some.

    Args:
        max_step_ms: milliseconds that a step is to take at most while others stream; None for no
            limit.
    """

    def __init__(self, max_step_ms: float | None) -> None:
        self._max_seconds = None if max_step_ms is None else max_step_ms / 1000
        self._decode_seconds = self._token_seconds = 0.0  # not known yet

    def limit(self, num_tokens: int) -> int:
        """At most so many tokens of prompts, in a step in which others decode."""
        if self._max_seconds is None:
            return num_tokens
        if not self._token_seconds:
            return min(num_tokens, FIRST_CHUNK)
        fitting = (self._max_seconds - self._decode_seconds) / self._token_seconds
        units = int(min(fitting, num_tokens)) // CHUNK_UNIT
        return min(num_tokens, max(1, units) * CHUNK_UNIT)

    def add_step(self, step: Step, seconds: float) -> None:
        """Take note of how long a step lasted."""
        pairs = zip(step.sequences, step.batch.query_lens, strict=True)
        lens = [query_len - len(step.drafts.get(one, ())) for one, query_len in pairs]
        num_prompt_tokens = sum(query_len for query_len in lens if query_len > 1)
        if num_prompt_tokens == 0:
            before = self._decode_seconds or seconds
            self._decode_seconds = before + DECODE_SHARE * (seconds - before)
        if num_prompt_tokens < CHUNK_UNIT:
            return  # so few tell nothing of many
        cost = max(seconds - self._decode_seconds, seconds / 2) / num_prompt_tokens
        before = self._token_seconds or cost
        self._token_seconds = before + PREFILL_SHARE * (cost - before)

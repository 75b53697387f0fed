"""Choose the next tokens from logits. Rank 0 only.

The choice is a pure function of a row's logits, its sampling parameters, the tokens before it and
one uniform number drawn from the request's own stream, so a request's text does not depend on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autotp_serving.model.adjust import LogitAdjuster
from autotp_serving.model.draw import draw_tokens
from autotp_serving.model.logprobs import find_logprobs
from autotp_serving.plan import INVALID_TOKEN, SampleInput, StepResult


class Sampler:
    """Samples a step's rows, and keeps what penalties need from one step to the next."""

    def __init__(self) -> None:
        self._adjuster = LogitAdjuster()

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, samples: Sequence[SampleInput]) -> StepResult:
        """Choose one token per row.

        Args:
            logits: [num_rows, vocab_size], any floating type.
            samples: num_rows sampling inputs, in the same order.
        """
        if not samples:
            return StepResult([])
        best, token_ids = logits.max(dim=-1)
        rows = [row for row, sample in enumerate(samples) if not sample.is_plain]
        if rows:
            picked = [samples[row] for row in rows]
            index = torch.tensor(rows, device=logits.device)
            token_ids[index] = self._choose(logits[index].float(), picked)
        token_ids = token_ids.where(best.isfinite(), INVALID_TOKEN)
        asked = [row for row in rows if samples[row].params.logprobs is not None]
        if not asked:
            return StepResult(token_ids.tolist())
        index = torch.tensor(asked, device=logits.device)
        num_top = [samples[row].params.logprobs for row in asked]
        found = find_logprobs(logits[index], token_ids[index], num_top)
        logprobs = dict(zip(asked, found, strict=True))
        return StepResult(token_ids.tolist(), [logprobs.get(row) for row in range(len(samples))])

    def release(self, request_id: str) -> None:
        """Forget what is kept for a request."""
        self._adjuster.release(request_id)

    def _choose(self, logits: torch.Tensor, samples: Sequence[SampleInput]) -> torch.Tensor:
        """Choose a token for each row that is not plain; `logits` are a copy in float32."""
        logits = self._adjuster.adjust(logits, samples)
        rows = [row for row, sample in enumerate(samples) if not sample.params.is_greedy]
        if len(rows) == len(samples):
            return draw_tokens(logits, samples)
        token_ids = logits.argmax(-1)
        if rows:
            index = torch.tensor(rows, device=logits.device)
            token_ids[index] = draw_tokens(logits[index], [samples[row] for row in rows])
        return token_ids

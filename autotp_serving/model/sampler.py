"""Choose the next tokens from logits. Rank 0 only.

The choice is a pure function of a row's logits, its sampling parameters, the tokens before it and
one uniform number drawn from the request's own stream, so a request's text does not depend on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autotp_serving.model.adjust import LogitAdjuster
from autotp_serving.model.logprobs import find_logprobs
from autotp_serving.plan import INVALID_TOKEN, SampleInput, StepResult

MIN_TEMPERATURE = 1e-6


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
        token_ids = logits.argmax(-1)
        rows = [row for row, sample in enumerate(samples) if not sample.params.is_greedy]
        if rows:
            index = torch.tensor(rows, device=logits.device)
            token_ids[index] = draw_tokens(logits[index], [samples[row] for row in rows])
        return token_ids


def draw_tokens(logits: torch.Tensor, samples: Sequence[SampleInput]) -> torch.Tensor:
    """Invert the cumulative distribution of each row at its uniform number.

    Temperature first, then top-k, then top-p over what top-k kept, then min-p, in the order of
    transformers' processors. Float32 throughout: some Intel GPUs have no float64.
    """
    device = logits.device

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    # Lower ones would vanish in float32 and divide zero by zero.
    temperature = column([max(sample.params.temperature, MIN_TEMPERATURE) for sample in samples])
    top_p = column([sample.params.top_p for sample in samples])
    min_p = column([sample.params.min_p for sample in samples])
    vocab_size = logits.shape[-1]
    # Clients may send numbers of any size, float32 may not hold them.
    top_k = column([min(sample.params.top_k or vocab_size, vocab_size) for sample in samples])
    # The largest logit becomes 0 before the division, which then cannot overflow to +inf - inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab_size, device=device)
    ordered = ordered.masked_fill(rank >= top_k, float("-inf"))
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    # Rank 0 always stays: rounding must never leave a row without a token.
    unlikely = (before >= top_p) | (probability < min_p * probability[:, :1])
    probability = probability.masked_fill(unlikely & (rank > 0), 0.0)
    cumulative = probability.cumsum(-1)
    threshold = column([sample.uniform for sample in samples]) * cumulative[:, -1:]
    choice = (cumulative <= threshold).sum(-1, keepdim=True)
    # A uniform within rounding of 1 must not step past the last token that has probability.
    # A row of NaN has no such token; the caller drops what is chosen there.
    last = (probability > 0).sum(-1, keepdim=True).clamp(min=1) - 1
    return order.gather(1, torch.minimum(choice, last)).squeeze(1)

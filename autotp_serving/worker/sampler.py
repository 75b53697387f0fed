"""Choose the next tokens from logits. Rank 0 only.

The choice is a pure function of a row's logits, its sampling parameters, the tokens before it and
one uniform number that belongs to the request and the position, so a request's text does not depend
on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from autotp_serving.batch import INVALID_TOKEN, PoolInput, SampleInput, ScoreInput, StepResult
from autotp_serving.request import TokenLogprobs
from autotp_serving.worker.logits_processors import LogitsProcessors
from autotp_serving.worker.logprobs import Fetch, find_logprobs, score_prompts
from autotp_serving.worker.pooling import Pooler
from autotp_serving.worker.sampling import sample_candidates, sample_tokens
from autotp_serving.worker.step_logits import StepLogits


@dataclass(slots=True)
class Sampled:
    """A step's choice, on its way to the host.

    Attributes:
        token_ids: [num_rows] on the device, INVALID_TOKEN where logits were not finite.
        host_token_ids: waits for them.
        asked: rows that asked for logprobs.
        logprobs: waits for theirs; None when nobody asked.
        scores: for each prompt part that is scored, waits for its logprobs.
        pooled: for each that is pooled, waits for its vector.
    """

    token_ids: torch.Tensor
    host_token_ids: Callable[[], torch.Tensor]
    asked: list[int]
    logprobs: Callable[[], list[TokenLogprobs]] | None
    scores: list[Callable[[], list[TokenLogprobs]]]
    pooled: list[Callable[[], bytes | None]]

    def wait(self) -> StepResult:
        """Wait until all is here; one token for each sample."""
        token_ids = [[token] for token in self.host_token_ids().tolist()]
        scores = [score() for score in self.scores]
        pooled = [one() for one in self.pooled]
        if self.logprobs is None:
            return StepResult(token_ids, (), scores, pooled)
        found = dict(zip(self.asked, self.logprobs(), strict=True))
        logprobs = [[found[row]] if row in found else None for row in range(len(token_ids))]
        return StepResult(token_ids, logprobs, scores)


class Sampler:
    """Samples a step's rows, and keeps what penalties need from one step to the next.

    Args:
        fetch: begins to copy a tensor to the host.
    """

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._logits_processors = LogitsProcessors()
        self._pooler = Pooler(fetch)

    @torch.inference_mode()
    def sample(
        self,
        logits: StepLogits,
        samples: Sequence[SampleInput],
        scores: Sequence[ScoreInput] = (),
        pools: Sequence[PoolInput] = (),
    ) -> Sampled:
        """Begin to choose one token per row, and to score the prompts in the rows after those.

        Args:
            logits: of all these rows, whole ones of any floating type.
            samples: sampling inputs of the first rows, in the same order.
            scores: what is known of the other rows.
            pools: what is known of all rows, where they are pooled; then there are no others.
        """
        num_samples = len(samples)
        pooled = self._pooler.pool(logits.whole, pools) if pools else []
        scored = score_prompts(logits.skip(num_samples), scores, self._fetch) if scores else []
        best, token_ids = logits.find_best(num_samples)
        device = token_ids.device
        ranked = [] if logits.top is None else logits.top.rows
        if logits.top is not None and ranked:
            index = torch.tensor(ranked, device=device)
            picked = [samples[row] for row in ranked]
            token_ids[index] = sample_candidates(logits.top.values, logits.top.token_ids, picked)
        done = {*ranked}
        rows = [row for row, one in enumerate(samples) if not one.is_plain and row not in done]
        if rows:
            picked = [samples[row] for row in rows]
            index = torch.tensor(rows, device=device)
            token_ids[index] = self._choose(logits.select(rows).float(), picked)
        token_ids = token_ids.where(best.isfinite(), INVALID_TOKEN)
        asked = [row for row in rows if samples[row].params.logprobs is not None]
        logprobs = None
        if asked:
            index = torch.tensor(asked, device=device)
            num_top = [samples[row].params.logprobs for row in asked]
            whole = logits.select(asked)
            logprobs = find_logprobs(whole, token_ids[index], num_top, self._fetch)
        return Sampled(token_ids, self._fetch(token_ids), asked, logprobs, scored, pooled)

    def release(self, request_id: str) -> None:
        """Forget what is kept for a request."""
        self._logits_processors.release(request_id)
        self._pooler.release(request_id)

    def _choose(self, logits: torch.Tensor, samples: Sequence[SampleInput]) -> torch.Tensor:
        """Choose a token for each row that is not plain; `logits` are a copy in float32."""
        logits = self._logits_processors.apply(logits, samples)
        rows = [row for row, sample in enumerate(samples) if not sample.params.is_greedy]
        if len(rows) == len(samples):
            return sample_tokens(logits, samples)
        token_ids = logits.argmax(-1)
        if rows:
            index = torch.tensor(rows, device=logits.device)
            token_ids[index] = sample_tokens(logits[index], [samples[row] for row in rows])
        return token_ids

"""Sample tokens: temperature, top-k, top-p, min-p, and one uniform number per row. Rank 0 only.

In the order of transformers' processors, vectorised over the rows, in float32 throughout (some
Intel GPUs have no float64). What is done for a row depends on its own parameters alone, so that
its neighbours cannot change what it samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autotp_serving.batch import SampleInput
from autotp_serving.request import MAX_CANDIDATES

MIN_TEMPERATURE = 1e-6

FEW_CANDIDATES, MANY_CANDIDATES = MAX_CANDIDATES, 1024
"""Likeliest tokens that top-k and top-p look at first: sorting a whole vocabulary takes longer than
a decoding step of a small model. Rows that need more are sorted."""


def sample_tokens(logits: torch.Tensor, samples: Sequence[SampleInput]) -> torch.Tensor:
    """Sample a token for each row.

    Args:
        logits: [num_rows, vocab_size] in float32, overwritten.
        samples: num_rows sampling inputs; none of them greedy.
    """
    _apply_temperature(logits, samples)
    groups: dict[int, list[int]] = {}
    for row, sample in enumerate(samples):
        groups.setdefault(_num_candidates(sample, logits.shape[-1]), []).append(row)
    token_ids = torch.empty(len(samples), dtype=torch.int64, device=logits.device)
    for num_candidates, rows in groups.items():
        index = torch.tensor(rows, device=logits.device)
        part = logits if len(groups) == 1 else logits[index]
        picked = [samples[row] for row in rows]
        if num_candidates:
            token_ids[index] = _sample_ranked(part, picked, num_candidates)
        else:
            token_ids[index] = _sample_from_all(part, picked)
    return token_ids


def sample_candidates(
    values: torch.Tensor, token_ids: torch.Tensor, samples: Sequence[SampleInput]
) -> torch.Tensor:
    """Sample a token for each row of which the largest logits are known: what `sample_tokens` does.

    Args:
        values: [num_rows, FEW_CANDIDATES or more] in float32, overwritten: the largest logits.
        token_ids: [num_rows, as many], theirs.
        samples: num_rows sampling inputs, with a top_k of at most FEW_CANDIDATES.
    """
    _apply_temperature(values, samples)
    values, token_ids = _sort_candidates(values, token_ids)
    values, token_ids = values[:, :FEW_CANDIDATES], token_ids[:, :FEW_CANDIDATES]
    chosen, _ = _sample_in_order(values, values[:, :1], samples)
    return token_ids.gather(1, chosen[:, None]).squeeze(1)


def _apply_temperature(logits: torch.Tensor, samples: Sequence[SampleInput]) -> None:
    """Divide logits [num_rows, any], the largest of each row among them, in place."""
    # Lower temperatures would vanish in float32 and divide zero by zero.
    temperature = _column(logits, [max(one.params.temperature, MIN_TEMPERATURE) for one in samples])
    # The largest logit becomes 0 before the division, which then cannot overflow to +inf - inf.
    logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature)


def _sort_candidates(
    values: torch.Tensor, token_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely first; of equal logits the first token, as in a stable sort of all."""
    token_ids, by_token = token_ids.sort(dim=-1)
    values, by_value = values.gather(1, by_token).sort(dim=-1, descending=True, stable=True)
    return values, token_ids.gather(1, by_value)


def _num_candidates(sample: SampleInput, vocab_size: int) -> int:
    """How many of the most likely tokens to look at; 0 for all, in any order."""
    top_k, top_p = sample.params.top_k, sample.params.top_p
    if not 0 < top_k < vocab_size and top_p == 1.0:
        return 0
    return min(vocab_size, FEW_CANDIDATES if 0 < top_k <= FEW_CANDIDATES else MANY_CANDIDATES)


def _sample_from_all(logits: torch.Tensor, samples: Sequence[SampleInput]) -> torch.Tensor:
    """Sample where neither top-k nor top-p is asked for: nothing needs an order."""
    return _invert(_drop_unlikely(logits.softmax(-1), samples), samples)


def _sample_ranked(
    logits: torch.Tensor, samples: Sequence[SampleInput], num_candidates: int
) -> torch.Tensor:
    """Sample from the most likely tokens, or from all of them in order where those are too few."""
    values, order = _sort_candidates(*logits.topk(num_candidates, dim=-1))
    chosen, is_enough = _sample_in_order(values, logits.logsumexp(-1, keepdim=True), samples)
    token_ids = order.gather(1, chosen[:, None]).squeeze(1)
    # Whether top-k alone is enough is known without asking the device.
    if all(0 < one.params.top_k <= num_candidates for one in samples):
        return token_ids
    for row in (~is_enough).nonzero().flatten().tolist():
        values, order = logits[row : row + 1].sort(dim=-1, descending=True, stable=True)
        total = values.logsumexp(-1, keepdim=True)
        chosen, _ = _sample_in_order(values, total, samples[row : row + 1])
        token_ids[row] = order[0, chosen[0]]
    return token_ids


def _sample_in_order(
    values: torch.Tensor, total: torch.Tensor, samples: Sequence[SampleInput]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample ranks from the most likely logits.

    Args:
        values: [num_rows, num_candidates], descending.
        total: [num_rows, 1], the logarithm of the sum over the whole vocabulary; read for rows
            without a top_k among the candidates.

    Returns:
        [num_rows] ranks, and [num_rows] whether the candidates hold all that may be sampled.
    """
    num_candidates = values.shape[-1]
    # Clients may send numbers of any size, float32 may not hold them.
    limit = [min(one.params.top_k or 2**24, 2**24) for one in samples]
    top_k = _column(values, limit)
    top_p = _column(values, [one.params.top_p for one in samples])
    rank = torch.arange(num_candidates, device=values.device)
    values = values.masked_fill(rank >= top_k, float("-inf"))
    # What top-k keeps is a distribution of its own; without it, the vocabulary is.
    kept = values.logsumexp(-1, keepdim=True)
    has_top_k = top_k <= num_candidates
    probability = (values - torch.where(has_top_k, kept, total)).exp()
    cumulative = probability.cumsum(-1)
    # Rank 0 always stays: rounding must never leave a row without a token.
    beyond = (cumulative - probability >= top_p) & (rank > 0)
    probability = _drop_unlikely(probability.masked_fill(beyond, 0.0), samples)
    is_enough = has_top_k | (cumulative[:, -1:] >= top_p)
    return _invert(probability, samples), is_enough.squeeze(1)


def _drop_unlikely(probability: torch.Tensor, samples: Sequence[SampleInput]) -> torch.Tensor:
    """Apply min-p."""
    if not any(sample.params.min_p for sample in samples):
        return probability
    min_p = _column(probability, [sample.params.min_p for sample in samples])
    least = min_p * probability.amax(-1, keepdim=True)
    return probability.masked_fill(probability < least, 0.0)


def _invert(probability: torch.Tensor, samples: Sequence[SampleInput]) -> torch.Tensor:
    """The column at which each row's running sum passes its uniform number's share of the whole."""
    cumulative = probability.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    uniform = _column(probability, [sample.uniform for sample in samples])
    choice = torch.searchsorted(cumulative, uniform * total, right=True)
    # A uniform within rounding of 1 must not step past the last token that has probability.
    last = torch.searchsorted(cumulative, total)
    # A row of NaN has no order: the caller drops what is chosen there.
    return torch.minimum(choice, last).clamp(max=probability.shape[-1] - 1).squeeze(1)


def _column(like: torch.Tensor, values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]

"""Logprobs of the model's own distribution: log-softmax of its logits as they come. Rank 0 only.

Temperature, penalties, bias and structures do not show in them (vLLM's default as well).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autotp_serving.plan import ScoreInput
from autotp_serving.request import TokenLogprobs

ROWS_AT_ONCE = 32
"""A row takes the vocabulary twice in float32: 32 rows of 128 K tokens are 32 MiB."""


@torch.inference_mode()
def find_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """Logprobs of one token per row, and of the likeliest ones.

    Args:
        logits: [num_rows, vocab_size], any floating type.
        token_ids: [num_rows]; a negative one stands for none, its logprob means nothing.
        num_top: [num_rows], how many likeliest tokens each row lists.
    """
    found: list[TokenLogprobs] = []
    most = min(max(num_top, default=0), logits.shape[-1])
    for start in range(0, len(num_top), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        rows = logits[part].float().log_softmax(-1)
        tokens = token_ids[part]
        chosen = rows.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1)
        top, top_ids = rows.topk(most, dim=-1)
        for token, logprob, count, ids, values in zip(
            tokens.tolist(),
            chosen.tolist(),
            num_top[part],
            top_ids.tolist(),
            top.tolist(),
            strict=True,
        ):
            pairs = tuple(zip(ids[:count], values[:count], strict=True))
            found.append(TokenLogprobs(token, logprob, pairs))
    return found


def score_prompts(logits: torch.Tensor, scores: Sequence[ScoreInput]) -> list[list[TokenLogprobs]]:
    """Logprobs of prompt tokens, from the rows before them.

    Args:
        logits: [num_rows, vocab_size], the rows of all scores one after another.
    """
    results = []
    start = 0
    for score in scores:
        stop = start + len(score.target_ids)
        targets = torch.tensor(score.target_ids, device=logits.device)
        results.append(
            find_logprobs(logits[start:stop], targets, [score.num_top] * len(score.target_ids))
        )
        start = stop
    return results

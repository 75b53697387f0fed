"""Logprobs of the model's own distribution: log-softmax of its logits as they come. Rank 0 only.

Temperature, penalties, bias and structured outputs do not show in them (vLLM's default as well).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from autotp_serving.batch import ScoreInput
from autotp_serving.request import TokenLogprobs

ROWS_AT_ONCE = 32
"""A row takes the vocabulary twice in float32: 32 rows of 128 K tokens are 32 MiB."""


Fetch = Callable[[torch.Tensor], Callable[[], torch.Tensor]]
"""Begins to copy a tensor to the host; see `Device.fetch`."""


@torch.inference_mode()
def find_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: Sequence[int], fetch: Fetch
) -> Callable[[], list[TokenLogprobs]]:
    """Begin to find logprobs of one token per row, and of the most likely ones.

    Args:
        logits: [num_rows, vocab_size], any floating type.
        token_ids: [num_rows]; a negative one stands for none, its logprob means nothing.
        num_top: [num_rows], how many most likely tokens each row lists.

    Returns:
        A function that waits for them.
    """
    parts = []
    most = min(max(num_top, default=0), logits.shape[-1])
    for start in range(0, len(num_top), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        rows = logits[part].float().log_softmax(-1)
        tokens = token_ids[part]
        chosen = rows.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1)
        top, top_ids = rows.topk(most, dim=-1)
        parts.append((num_top[part], [fetch(one) for one in (tokens, chosen, top_ids, top)]))

    def wait() -> list[TokenLogprobs]:
        found: list[TokenLogprobs] = []
        for counts, fetched in parts:
            columns = (one().tolist() for one in fetched)
            for count, token, logprob, ids, values in zip(counts, *columns, strict=True):
                pairs = tuple(zip(ids[:count], values[:count], strict=True))
                found.append(TokenLogprobs(token, logprob, pairs))
        return found

    return wait


def score_prompts(
    logits: torch.Tensor, scores: Sequence[ScoreInput], fetch: Fetch
) -> list[Callable[[], list[TokenLogprobs]]]:
    """Begin to find logprobs of prompt tokens, from the rows before them.

    Args:
        logits: [num_rows, vocab_size], the rows of all scores one after another.

    Returns:
        For each score a function that waits for them.
    """
    results = []
    start = 0
    for score in scores:
        stop = start + len(score.target_ids)
        targets = torch.tensor(score.target_ids, device=logits.device)
        results.append(
            find_logprobs(
                logits[start:stop], targets, [score.num_top] * len(score.target_ids), fetch
            )
        )
        start = stop
    return results

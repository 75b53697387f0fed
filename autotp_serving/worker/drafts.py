"""Which drafts a step's samples accept. Rank 0 only.

Each token is sampled as it would be in a step of its own: from the logits behind the tokens before
it, with the draw of its position. A draft is accepted if it is that token. What follows a refused
draft was computed from the wrong text, and is dropped. So tokens, greedy or drawn, are those that
would have come without drafts, and drawn ones have the model's distribution.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

from autotp_serving.batch import INVALID_TOKEN, Batch, StepResult


def accept_drafts(batch: Batch, result: StepResult) -> StepResult:
    """Give each sequence its accepted drafts, and the token after them.

    Args:
        batch: whose tokens are all known.
        result: with one token for each sample.
    """
    ends = list(accumulate(batch.query_lens))
    token_ids, logprobs = [], []
    first = 0
    for index in batch.sampled:
        num_drafts = batch.num_drafts[index]
        drafts = batch.token_ids[ends[index] - num_drafts : ends[index]]
        samples = [token for (token,) in result.token_ids[first : first + num_drafts + 1]]
        count = 1
        for draft, (sample, following) in zip(drafts, pairwise(samples), strict=True):
            # A step of its own shall say that the numbers behind it are invalid.
            if sample != draft or following == INVALID_TOKEN:
                break
            count += 1
        token_ids.append(samples[:count])
        if result.logprobs:
            parts = result.logprobs[first : first + count]
            asked = [one for part in parts if part is not None for one in part]
            logprobs.append(asked or None)
        first += num_drafts + 1
    return replace(result, token_ids=token_ids, logprobs=logprobs)

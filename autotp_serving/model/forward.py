"""One forward pass over a step's tokens, as transformers' own model code does it. Every rank."""

from __future__ import annotations

import torch
from torch import nn

from autotp_serving.model.attention import AttentionContext
from autotp_serving.model.kv_cache import KVCache
from autotp_serving.plan import StepPlan


class PlainForward:
    """Runs any model whose attention goes through `paged_attention`."""

    def __init__(self, model: nn.Module, cache: KVCache) -> None:
        self._model = model
        self._cache = cache

    def __call__(self, plan: StepPlan) -> torch.Tensor:
        """Run the plan's tokens.

        Returns:
            Logits [num_logit_rows, vocab_size], in the model's type.
        """
        device = self._cache.device
        return self._model(
            input_ids=torch.tensor([plan.token_ids], device=device),
            position_ids=torch.tensor([plan.positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(plan.logit_rows, dtype=torch.int64, device=device),
            attention_context=AttentionContext.from_plan(plan, self._cache),
        ).logits[0]

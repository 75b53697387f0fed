"""Run step plans on the model. `ModelRunner` on every rank, `LeadRunner` on rank 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from autotp_serving.channel import PlanChannel
from autotp_serving.model.attention import AttentionContext
from autotp_serving.model.kv_cache import KVCache
from autotp_serving.model.sampler import sample_tokens
from autotp_serving.plan import SampleInput, StepPlan

STOP_MESSAGE = b""


class ModelRunner:
    """This rank's model and cache."""

    def __init__(self, model: nn.Module, cache: KVCache) -> None:
        self._model = model
        self._cache = cache

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> torch.Tensor:
        """Run one forward pass; all ranks must do so together.

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

    def follow(self, channel: PlanChannel) -> None:
        """On ranks other than 0: obey plans until rank 0 says stop."""
        while (message := channel.receive()) != STOP_MESSAGE:
            self.run(StepPlan.from_bytes(message))


class LeadRunner:
    """Rank 0's runner: tells the other ranks, runs with them, samples."""

    def __init__(self, runner: ModelRunner, cache: KVCache, channel: PlanChannel) -> None:
        self._runner = runner
        self._channel = channel
        self.num_blocks = cache.num_blocks
        self.block_size = cache.block_size

    def execute(self, plan: StepPlan, samples: Sequence[SampleInput]) -> list[int]:
        """Run one step on all ranks and choose a token for each of the plan's logit rows."""
        self._channel.send(plan.to_bytes())
        logits = self._runner.run(plan)
        return sample_tokens(logits, samples) if samples else []

    def stop(self) -> None:
        """Let the other ranks go."""
        self._channel.send(STOP_MESSAGE)

"""Run step plans on the model. `ModelRunner` on every rank, `LeadRunner` on rank 0."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from autotp_serving.channel import PlanChannel
from autotp_serving.model.kv_cache import KVCache
from autotp_serving.model.logprobs import score_prompts
from autotp_serving.model.sampler import Sampler
from autotp_serving.plan import SampleInput, ScoreInput, StepPlan, StepResult
from autotp_serving.step_times import LAYOUT, RankTimes, StepTimes

STOP_MESSAGE = b""


class ModelRunner:
    """This rank's forward pass; what its steps cost is in `times`."""

    def __init__(self, forward: Callable[[StepPlan], torch.Tensor], times: StepTimes) -> None:
        self.times = times
        self._forward = forward

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> torch.Tensor:
        """Run one forward pass; all ranks must do so together.

        Returns:
            Logits [num_logit_rows, vocab_size], in the model's type.
        """
        started = time.perf_counter()
        logits = self._forward(plan)
        self.times.add_step(time.perf_counter() - started)
        return logits

    def follow(self, channel: PlanChannel) -> None:
        """On ranks other than 0: obey plans until rank 0 says stop."""
        while (message := channel.receive()) != STOP_MESSAGE:
            self.run(StepPlan.from_bytes(message))
            channel.report(self.times.snapshot().to_bytes())
        channel.stop_watching()


class LeadRunner:
    """Rank 0's runner: tells the other ranks, runs with them, samples."""

    def __init__(
        self, runner: ModelRunner, cache: KVCache, channel: PlanChannel, num_ranks: int
    ) -> None:
        self.rank_times = [RankTimes() for _ in range(num_ranks)]
        self._runner = runner
        self._channel = channel
        self._num_sent = 0
        self._sampler = Sampler()
        self.num_blocks = cache.num_blocks
        self.block_size = cache.block_size

    def execute(
        self,
        plan: StepPlan,
        samples: Sequence[SampleInput],
        scores: Sequence[ScoreInput] = (),
    ) -> StepResult:
        """See Runner: one step on all ranks, then choose and score on this one.

        Raises:
            ConnectionError: naming the rank that is gone.
        """
        self._num_sent += 1
        self._channel.send(plan.to_bytes())
        try:
            logits = self._runner.run(plan)
        except RuntimeError as error:  # a sum that lacks a rank names its socket at best
            loss = self._channel.find_loss()
            if loss is None:
                raise
            raise ConnectionError(loss) from error
        result = self._sampler.sample(logits[: len(samples)], samples)
        if scores:
            result = replace(result, scores=score_prompts(logits[len(samples) :], scores))
        self.rank_times[0] = self._runner.times.snapshot()
        self._read_reports()
        return result

    def find_late_ranks(self) -> str:
        """Who has not done the step under way, in words; for any thread, while it lasts."""
        try:
            self._read_reports()
        except ConnectionError as error:
            return str(error)
        late = [
            self._channel.name(rank)
            for rank, times in enumerate(self.rank_times)
            if rank and times.num_steps < self._num_sent
        ]
        # While others are late rank 0 may be waiting for them.
        if len(late) > 1:
            return f"{' and '.join(late)} have not reported; they or their neighbours hang"
        return f"{late[0] if late else self._channel.name(0)} has not reported, it hangs"

    def _read_reports(self) -> None:
        for rank, report in self._channel.take_reports(LAYOUT.size).items():
            self.rank_times[rank] = RankTimes.from_bytes(report)

    def release(self, request_id: str) -> None:
        """See Runner; the other ranks keep nothing but pages."""
        self._sampler.release(request_id)

    def stop(self) -> None:
        """Let the other ranks go."""
        self._channel.stop_watching()
        self._channel.send(STOP_MESSAGE)

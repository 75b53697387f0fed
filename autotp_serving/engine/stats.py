"""The engine's figures at one moment, for metrics and logs. Rank 0 only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from autotp_serving.request import FinishReason


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges of now and totals since the start.

    Attributes:
        num_running: sequences that take part in steps.
        num_waiting: requests accepted and not running, preempted ones included.
        num_blocks: blocks in the KV pool.
        num_held_blocks: blocks that running sequences hold.
        num_steps: steps run.
        num_prompt_tokens: prompt tokens of the requests that got a first token.
        num_generated_tokens: tokens sampled.
        num_prefix_query_tokens: prompt tokens looked up in the prefix cache.
        num_prefix_hit_tokens: those of them that were found.
        num_offload_hit_tokens: those of them that came from files beyond the pool.
        num_preemptions: times a running sequence lost its blocks and went back to wait.
        num_drafts: times that a sequence ran guessed tokens in a step.
        num_draft_tokens: tokens that were guessed.
        num_accepted_tokens: those of them that came out.
        num_restarts: times the ranks were started anew.
        num_finished: requests ended, by reason.
        last_step_seconds: how long the last step took, all in all.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_held_blocks: int
    num_steps: int
    num_prompt_tokens: int
    num_generated_tokens: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    num_offload_hit_tokens: int
    num_preemptions: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_restarts: int
    num_finished: dict[FinishReason, int]
    last_step_seconds: float


def add_stats(stats: Sequence[EngineStats]) -> EngineStats:
    """Of several groups of ranks together; of their last steps the slowest."""
    names = [field.name for field in fields(EngineStats)]
    values = {name: [getattr(one, name) for one in stats] for name in names}
    finished = values.pop("num_finished")
    return EngineStats(
        **{name: sum(some) for name, some in values.items()}
        | {"last_step_seconds": max(values["last_step_seconds"])},
        num_finished={reason: sum(one[reason] for one in finished) for reason in finished[0]},
    )

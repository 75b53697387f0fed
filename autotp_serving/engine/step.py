"""One step as the engine sees it: the plan for the ranks, and whom it serves. Rank 0 only."""

from __future__ import annotations

from dataclasses import dataclass

from autotp_serving.engine.sequence import Sequence
from autotp_serving.plan import SampleInput, ScoreInput, StepPlan


@dataclass(frozen=True)
class Step:
    """A plan together with whom it serves.

    Attributes:
        plan: what the runner executes.
        samples: [num_samples], what the sampler needs for the first rows of `plan.logit_rows`.
        scores: [num_scores], what is known of the rows after those.
        sequences: [num_seqs], in the plan's order.
        sampled: [num_samples], the sequences that get a token.
        scored: [num_scores], the sequences that get prompt logprobs.
        read: sequences that end with this step, as they want nothing but their prompt's logprobs.
    """

    plan: StepPlan
    samples: list[SampleInput]
    scores: list[ScoreInput]
    sequences: list[Sequence]
    sampled: list[Sequence]
    scored: list[Sequence]
    read: list[Sequence]


def write_step(chunks: list[tuple[Sequence, int]], block_size: int) -> Step:
    """Write the plan that runs so many tokens of each sequence, their pages being ready."""
    plan = StepPlan([], [], [], [], [], [], [])
    step = Step(plan, [], [], [], [], [], [])
    score_rows: list[int] = []
    for sequence, query_len in chunks:
        first_row = len(plan.token_ids)
        start = sequence.num_computed_tokens
        end = start + query_len
        # Copies: a plan may still be under way when the next step changes the sequence.
        table = sequence.block_table[: -(-end // block_size)]
        plan.token_ids.extend(sequence.token_ids[start:end])
        plan.positions.extend(range(start, end))
        plan.slots.extend(
            table[position // block_size] * block_size + position % block_size
            for position in range(start, end)
        )
        plan.query_lens.append(query_len)
        plan.context_lens.append(end)
        plan.block_tables.append(table)
        step.sequences.append(sequence)
        if end == sequence.num_tokens:
            if sequence.params.max_tokens:
                plan.logit_rows.append(len(plan.token_ids) - 1)
                step.samples.append(_sample_input(sequence))
                step.sampled.append(sequence)
            else:
                step.read.append(sequence)
        if sequence.num_unscored_tokens:
            score_rows += _add_scores(step, sequence, start, end, first_row)
    plan.logit_rows.extend(score_rows)
    return step


def _sample_input(sequence: Sequence) -> SampleInput:
    params = sequence.params
    bans_end = sequence.num_output_tokens < params.min_tokens
    return SampleInput(
        params,
        sequence.uniforms.random(),
        sequence.request_id,
        sequence.token_ids,
        sequence.num_prompt_tokens,
        tuple(sequence.end_token_ids) if bans_end else (),
        None if sequence.guide is None else sequence.guide.allowed(),
    )


def _add_scores(step: Step, sequence: Sequence, start: int, end: int, first_row: int) -> range:
    """Have the known successors of a chunk's tokens scored; returns the rows."""
    # A sequence that was preempted runs again through tokens whose scores are known.
    first = max(start, len(sequence.prompt_logprobs))
    last = min(end, sequence.num_prompt_tokens - 1)
    if first >= last:
        return range(0)
    targets = sequence.token_ids[first + 1 : last + 1]
    step.scores.append(ScoreInput(targets, sequence.params.prompt_logprobs))
    step.scored.append(sequence)
    return range(first_row + first - start, first_row + last - start)

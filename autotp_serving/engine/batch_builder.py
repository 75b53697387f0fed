"""One step as the engine sees it: the batch for the ranks, and whom it serves. Rank 0 only."""

from __future__ import annotations

from dataclasses import dataclass, field

from autotp_serving.batch import Batch, PoolInput, SampleInput, ScoreInput
from autotp_serving.engine.sequence import Sequence
from autotp_serving.request import TokenLogprobs


@dataclass(slots=True)
class Step:
    """A batch together with whom it serves.

    Attributes:
        number: steps are numbered from 1 in the order in which they run.
        batch: what the runner runs.
        drafts: tokens that some of the sequences run as guesses.
        samples: [num_samples], what the sampler needs for each of the batch's `sampled`, for its
            drafts as well.
        scores: [num_scores], what is known of the batch's `score_rows`.
        sequences: [num_seqs], in the batch's order.
        sampled: the sequences that get a token or, with drafts, several.
        scored: [num_scores], the sequences that get prompt logprobs.
        pools: [num_pools], what is known of the batch's `score_rows` where they are pooled.
        pooled: [num_pools], the sequences that they are of.
        read: sequences that end with this step, as they want nothing but their prompt's logprobs.
        kept_states: after this step a sequence's state is kept, for the end of the block of this
            index, in this row of the states.
    """

    number: int
    batch: Batch
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    samples: list[SampleInput] = field(default_factory=list)
    scores: list[ScoreInput] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    scored: list[Sequence] = field(default_factory=list)
    pools: list[PoolInput] = field(default_factory=list)
    pooled: list[Sequence] = field(default_factory=list)
    read: list[Sequence] = field(default_factory=list)
    kept_states: list[tuple[Sequence, int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that it runs."""
        return sum(self.batch.query_lens)


@dataclass(slots=True)
class Progress:
    """What a step did for one sequence.

    Attributes:
        token_ids: the tokens it got; none if it ended without one.
        logprobs: one for each of them, if they were asked for.
    """

    sequence: Sequence
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None


def build_step(
    number: int, chunks: list[tuple[Sequence, int]], drafts: dict[Sequence, list[int]]
) -> Step:
    """Write the batch that runs so many tokens of each sequence and then its drafts, their blocks
    being ready.

    From then on the sequences' tokens count as scheduled, and those to be sampled as pending;
    drafts count once they are accepted.
    """
    batch = Batch([], [], [], [], [])
    step = Step(number, batch, drafts)
    if drafts:
        batch.num_drafts = [len(drafts.get(sequence, ())) for sequence, _ in chunks]
    num_tokens = 0
    num_top: list[int] = []
    for index, (sequence, query_len) in enumerate(chunks):
        start = sequence.num_scheduled_tokens
        end = start + query_len
        guesses = drafts.get(sequence, [])
        known = sequence.token_ids[start:end] + guesses
        batch.rows.append(sequence.row)
        batch.starts.append(start)
        batch.query_lens.append(query_len + len(guesses))
        batch.num_known.append(len(known))
        batch.token_ids.extend(known)
        if len(sequence.block_table) > sequence.num_sent_blocks:
            send_blocks(batch, index, sequence)
        step.sequences.append(sequence)
        if sequence.params.pooling is not None:
            batch.score_rows.extend(_add_pool(step, sequence, start, end, num_tokens))
        elif end == sequence.num_tokens + sequence.num_pending_tokens:
            if sequence.params.max_tokens:
                batch.sampled.append(index)
                step.samples += [
                    sequence.make_sample(guesses[:count]) for count in range(1 + len(guesses))
                ]
                num_top += [0 if sequence.guide else sequence.params.num_top_logits] * (
                    1 + len(guesses)
                )
                step.sampled.append(sequence)
                sequence.num_pending_tokens += 1
            else:
                step.read.append(sequence)
        if sequence.num_unscored_tokens:
            batch.score_rows.extend(_add_scores(step, sequence, start, end, num_tokens))
        sequence.num_scheduled_tokens = end
        sequence.last_step = number
        num_tokens += query_len + len(guesses)
    adapters = [sequence.request.adapter for sequence, _ in chunks]
    if any(adapters):
        batch.adapters = [0 if adapter is None else adapter.slot for adapter in adapters]
    if num_top.count(1) < len(num_top):
        batch.num_top = num_top
    return step


def send_blocks(batch: Batch, index: int, sequence: Sequence) -> None:
    """Tell the ranks what they do not know of a sequence's block table."""
    first = sequence.num_sent_blocks
    batch.grown.append(index)
    batch.first_blocks.append(first)
    batch.num_new_blocks.append(len(sequence.block_table) - first)
    batch.new_blocks.extend(sequence.block_table[first:])
    sequence.num_sent_blocks = len(sequence.block_table)


def _add_pool(step: Step, sequence: Sequence, start: int, end: int, first_row: int) -> range:
    """Have a chunk pooled, as far as the method takes its tokens; returns the rows."""
    pooling = sequence.params.pooling
    assert pooling is not None, "only what is pooled is added"
    is_first, is_last = start == 0, end == sequence.num_tokens
    rows = range(first_row, first_row + end - start)
    if pooling.method == "last":
        rows = rows[-1:] if is_last else rows[:0]
    elif pooling.method == "cls":
        rows = rows[:1] if is_first else rows[:0]
    if rows or is_last:
        step.pools.append(
            PoolInput(
                sequence.request_id, pooling, len(rows), sequence.num_tokens, is_first, is_last
            )
        )
        step.pooled.append(sequence)
    return rows


def _add_scores(step: Step, sequence: Sequence, start: int, end: int, first_row: int) -> range:
    """Have the known successors of a chunk's tokens scored; returns the rows."""
    # A sequence that was preempted runs again through tokens whose scores are known.
    first = max(start, len(sequence.prompt_logprobs))
    last = min(end, sequence.num_prompt_tokens - 1)
    if first >= last:
        return range(0)
    targets = sequence.token_ids[first + 1 : last + 1]
    step.scores.append(ScoreInput(targets, sequence.params.prompt_logprobs or 0))
    step.scored.append(sequence)
    return range(first_row + first - start, first_row + last - start)

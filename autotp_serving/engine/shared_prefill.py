"""Which newcomer waits a step for blocks that another sequence computes right now. Rank 0 only.

Equal prompts that arrive together, such as the `n` choices of one request, are computed once: the
first runs, and the others take its blocks when its step is collected. A wait cannot outlast the
steps in flight. Should the other end or fail meanwhile, its blocks are not found, and the next one
computes them.
"""

from __future__ import annotations

from collections.abc import Iterable

from autotp_serving.engine.sequence import Sequence

MIN_SAVED_TOKENS = 64
"""That computing once must save, in the prompts of all that would wait: a step of its own costs
about what so many more tokens in another do."""


def should_wait(
    first: Sequence,
    others: Iterable[Sequence],
    matched: list[int],
    running: Iterable[tuple[Sequence, int]],
    block_size: int,
    *,
    has_states: bool,
) -> bool:
    """Whether the first newcomer's next blocks are on their way, and enough of them.

    Args:
        first: the newcomer.
        others: more that could begin to run now.
        matched: blocks of the first one's prompt that are known by now.
        running: sequences, each with how many of its tokens will have run after the steps in
            flight and the one that is being made.
        has_states: blocks can be taken only up to where the state is kept, too.
    """
    num_known = len(matched)
    start = num_known * block_size
    num_shared = 0
    for sequence, end in running:
        if end - start < block_size or sequence.num_registered_blocks != num_known:
            continue
        if sequence.request.adapter is not first.request.adapter:
            continue
        if sequence.block_table[:num_known] != matched:
            continue
        ends = sequence.state_ends if has_states else [end]
        end = max((one for one in ends if one <= end), default=0)
        end = min(end, len(sequence.token_ids), first.num_tokens - 1)
        num_shared = max(num_shared, _count_equal(sequence, first, start, end, block_size))
    if not num_shared:
        return False
    shared = first.token_ids[: start + num_shared]
    num_waiting = 1 + sum(
        one.token_ids[: len(shared)] == shared and one.request.adapter is first.request.adapter
        for one in others
    )
    return num_waiting * num_shared >= MIN_SAVED_TOKENS


def _count_equal(one: Sequence, other: Sequence, start: int, end: int, block_size: int) -> int:
    """Tokens of the full blocks, from `start` to `end`, that are the same in both."""
    position = start
    while position + block_size <= end:
        block = slice(position, position + block_size)
        if one.token_ids[block] != other.token_ids[block]:
            break
        position += block_size
    return position - start

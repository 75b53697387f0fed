"""The step plan survives its journey: what a follower unpacks is what rank 0 packed."""

from __future__ import annotations

import random
from array import array

import pytest

from autotp_serving.plan import StepPlan


def draw_plan(draw: random.Random) -> StepPlan:
    """Any lists of the right lengths; a plan's bytes do not depend on their sense."""
    num_seqs = draw.randrange(5)
    query_lens = [draw.randint(1, 40) for _ in range(num_seqs)]
    num_tokens = sum(query_lens)

    def numbers(count: int) -> list[int]:
        return [draw.choice([0, 1, draw.randrange(2**31), 2**31 - 1]) for _ in range(count)]

    return StepPlan(
        token_ids=numbers(num_tokens),
        positions=numbers(num_tokens),
        slots=numbers(num_tokens),
        query_lens=query_lens,
        context_lens=numbers(num_seqs),
        block_tables=[numbers(draw.randrange(9)) for _ in range(num_seqs)],
        logit_rows=numbers(draw.randint(0, num_seqs)),
    )


@pytest.mark.parametrize("seed", range(200))
def test_bytes_hold_the_whole_plan(seed: int) -> None:
    plan = draw_plan(random.Random(seed))
    assert StepPlan.from_bytes(plan.to_bytes()) == plan


def test_an_empty_plan_is_not_the_stop_message() -> None:
    """Followers stop at an empty message: no plan may look like one."""
    plan = StepPlan([], [], [], [], [], [], [])
    assert len(plan.to_bytes()) == 3 * array("i").itemsize
    assert StepPlan.from_bytes(plan.to_bytes()) == plan


def test_a_number_that_does_not_fit_is_refused_and_not_wrapped() -> None:
    with pytest.raises(OverflowError):
        StepPlan([2**31], [0], [0], [1], [1], [[0]], [0]).to_bytes()

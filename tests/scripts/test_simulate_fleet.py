"""The simulated fleet: steps take what was measured, nothing is lost, and caches help."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from scripts.simulate_fleet import (
    ROUTERS,
    STEP_TIMES,
    Limits,
    Load,
    Replica,
    StepTimes,
    Summary,
    Turn,
    simulate,
)

TIMES = StepTimes.read(STEP_TIMES)
LOAD = Load(turns_per_second=8, num_turns=3, pause_seconds=3)


def run(router: str, num_replicas: int = 4, times: StepTimes = TIMES, **load: float) -> list[Turn]:
    return simulate(router, num_replicas, 12, times, replace(LOAD, **load))


def describe(turns: list[Turn]) -> list[tuple[float, ...]]:
    return sorted((turn.arrival, turn.first_token, turn.end, turn.num_cached) for turn in turns)


def test_steps_take_what_was_measured() -> None:
    for size, ms in json.loads(STEP_TIMES.read_text())["decode_ms"].items():
        rows = int(size)
        assert TIMES.find_seconds(rows, rows * TIMES.context, 0) == pytest.approx(ms / 1e3)
    assert TIMES.find_seconds(0, 0, 434) == pytest.approx(0.01)
    seconds = [TIMES.find_seconds(rows, rows * 500, 64) for rows in range(1, 400)]
    assert seconds == sorted(seconds)


def test_a_request_alone_takes_its_prefill_and_its_steps() -> None:
    replica = Replica(TIMES, LOAD, Limits())
    replica.add(Turn(0.0, 0, 0, num_prompt=5000, num_answer=11, num_turns_left=0))
    now, ended = 0.0, []
    while (seconds := replica.begin_step()) is not None:
        now += seconds
        ended += replica.end_step(now)
    turn = ended[0]
    assert turn.first_token == pytest.approx(5000 / TIMES.prefill_rate)
    steps = sum(TIMES.find_seconds(1, 5000 + step, 0) for step in range(10))
    assert turn.end - turn.first_token == pytest.approx(steps)
    assert (replica.num_requests, replica.num_left, replica.count_cached(turn)) == (0, 0, 4999)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_turn_ends_in_order_and_the_same_each_time(router: str) -> None:
    turns = run(router)
    assert describe(turns) == describe(run(router))
    by_conversation: dict[int, list[Turn]] = {}
    for turn in turns:
        assert turn.arrival < turn.first_token <= turn.end
        assert 0 <= turn.num_cached < turn.num_prompt
        by_conversation.setdefault(turn.conversation, []).append(turn)
    for said in by_conversation.values():
        for before, after in pairwise(said):
            assert after.arrival >= before.end
            assert after.num_prompt > before.num_prompt + before.num_answer
    assert len(by_conversation) == max(by_conversation) + 1, "a conversation was lost"


def test_one_replica_is_the_same_under_every_router() -> None:
    first, *others = (describe(run(router, num_replicas=1)) for router in ROUTERS)
    assert all(other == first for other in others)


def test_caches_are_hit_as_far_as_they_reach() -> None:
    def share(router: str, kv_cache_tokens: int = TIMES.kv_cache_tokens) -> float:
        turns = run(router, times=replace(TIMES, kv_cache_tokens=kv_cache_tokens))
        return Summary.of(turns, 0, 12, 4).hit_share

    assert share("round robin") < share("prefix, the head's")
    assert share("least loaded") < share("prefix, Ray's")
    assert share("prefix, the head's", 1) == 0
    assert share("prefix, the head's", 20_000) < share("prefix, the head's")

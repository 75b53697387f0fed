"""Priorities: who is next, who is preempted, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.engine.priority_queue import TURN_LEN, PriorityQueue
from autotp_serving.engine.sequence import Sequence
from autotp_serving.request import Request, SamplingParams
from tests.api.service import client
from tests.engine.test_groups import GroupsBench
from tests.engine.test_scheduler import Bench
from tests.fakes import generate


def make(name: str, priority: int = 0, tenant: str = "") -> Sequence:
    request = Request(name, (1,), SamplingParams(), 0.0, tenant, priority=priority)
    return Sequence(request, 0)


def drain(queue: PriorityQueue, most: int = 1000) -> list[str]:
    names = []
    while queue and len(names) < most:
        head = queue.head
        assert queue.pop() is head
        names.append(head.request_id)
    return names


def test_lower_numbers_go_first_and_each_keeps_the_order_and_the_turns_of_a_queue():
    queue = PriorityQueue(is_strict=True)
    for name, priority, tenant in (
        ("late", 9, ""), ("a1", 0, "a"), ("a2", 0, "a"), ("b1", 0, "b"), ("first", -3, ""),
    ):  # fmt: skip
        queue.append(make(name, priority, tenant))
    queue.put_back(make("ran", 0, "a"))
    expected = ["first", "ran", "a1", "b1", "a2", "late"]
    assert [sequence.request_id for sequence in queue] == ["first", "ran", "a1", "a2", "b1", "late"]
    with pytest.raises(ValueError, match="does not wait"):
        queue.remove(make("other", 5))
    assert drain(queue) == expected


@pytest.mark.parametrize("is_strict", [False, True])
def test_a_flood_of_others_does_not_keep_one_waiting_unless_that_is_asked_for(is_strict: bool):
    queue = PriorityQueue(is_strict=is_strict)
    late = [make(f"late{number}", 5) for number in range(3)]
    for sequence in late:
        queue.append(sequence)
    taken = []
    for number in range(4 * TURN_LEN):
        queue.append(make(f"flood{number}", -(10**6)))
        taken.append(queue.pop())
    places = [number for number, one in enumerate(taken, start=1) if one in late]
    assert places == ([] if is_strict else [TURN_LEN, 2 * TURN_LEN, 3 * TURN_LEN])
    if not is_strict:  # who had a turn keeps its place
        queue.put_back(late[0])
        queue.append(make("urgent", -(10**6)))
        assert queue.pop() is late[0]


def bench_of(**settings: Any) -> Bench:
    return Bench(scheduling_policy="priority", **settings)


def add(bench: Bench, name: str, prompt: int, priority: int, **params: Any) -> Sequence:
    request = Request(name, tuple(range(prompt)), SamplingParams(**params), 0.0, priority=priority)
    return bench.scheduler.add(request)


@pytest.mark.parametrize("seed", range(8))
def test_the_least_urgent_is_preempted_and_all_get_their_tokens(seed: int):
    """Drawn at random: whoever loses its blocks, none that runs on has a higher number."""
    draws = random.Random(seed)
    bench = bench_of(num_blocks=14, max_num_seqs=4, max_num_batched_tokens=8)
    found: list[Sequence] = []
    for number in range(30):
        if number < 12:
            found.append(
                add(bench, f"s{number}", draws.randint(1, 20), draws.randint(-2, 2), max_tokens=16)
            )
        before = {one: one.num_preemptions for one in found}
        bench.step()
        running = bench.scheduler.running
        assert [one.priority for one in running] == sorted(one.priority for one in running)
        for one in found:
            if one.num_preemptions > before[one]:
                assert all(other.priority <= one.priority for other in running)
    bench.run()
    assert sum(one.num_preemptions for one in found) > 0
    for one in found:
        assert one.finish_reason == "length"
        prompt = one.request.prompt_token_ids
        samples = [one.make_sample([0] * n) for n in range(16)]
        assert one.token_ids[len(prompt) :] == generate(prompt, samples)


def test_replays_after_a_groups_death_keep_the_priorities():
    bench = bench_of(max_num_seqs=2)
    for name, priority in (("a", 2), ("b", 1)):
        add(bench, name, 4, priority, max_tokens=8)
    bench.step()
    for name, priority in (("c", 0), ("d", 3)):
        add(bench, name, 4, priority, max_tokens=8)
    bench.in_flight.clear()
    bench.scheduler.restart()
    assert [one.request_id for one in bench.scheduler.waiting] == ["c", "b", "a", "d"]


def test_another_group_takes_them_in_their_order():
    bench = GroupsBench(scheduling_policy="priority", max_num_seqs=1)
    for number in range(6):
        name, priority = f"r{number}", -number
        request = Request(name, (65,), SamplingParams(max_tokens=4), 0.0, priority=priority)
        bench.groups.submit(request)
    bench.step()
    bench.groups.engines[0].lose("gone")
    bench.step(2)
    waiting = bench.groups.engines[1].scheduler.waiting
    numbers = [one.request.priority for one in waiting]
    assert numbers == sorted(numbers) and len(numbers) >= 4


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/generate": {"prompt": "x", "n_predict": 2},
}


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_field_reaches_the_scheduler_or_is_refused_by_name(policy: str):
    async def go() -> None:
        async with client(config={"scheduling_policy": policy}) as (http, service):
            scheduler = service.engine.engine.scheduler
            add, seen = scheduler.add, []
            scheduler.add = lambda request: seen.append(request.priority) or add(request)
            for path, body in ROUTES.items():
                for value in (0, -7):
                    reply = await http.post(path, json=body | {"priority": value})
                    is_refused = policy == "fcfs" and value != 0
                    assert reply.status_code == (400 if is_refused else 200), reply.text
                    if is_refused:
                        error = reply.json()["error"]
                        assert error["param"] == "priority"
                        assert "--scheduling-policy priority" in error["message"]
            assert seen == ([0] if policy == "fcfs" else [0, -7]) * len(ROUTES)
            reply = await http.post("/generate", json={"prompt": "x", "priority": 2**31})
            assert reply.status_code == 400

    asyncio.run(go())


def test_a_policy_that_is_not_there_is_refused_in_scripts_too():
    with pytest.raises(ConfigError, match="--scheduling-policy must be one of fcfs, priority"):
        ServingConfig(model_path="m", scheduling_policy="sjf")

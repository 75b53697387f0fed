"""Turns between tenants: nobody waits behind another's flood, nothing changes where all are one."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from autotp_serving.engine import QueueFullError, ShareFullError
from autotp_serving.engine.sequence import Sequence
from autotp_serving.engine.waiting_queue import WaitingQueue
from autotp_serving.request import Request, SamplingParams
from tests.engine.test_engine import Bench


def make(name: str, tenant: str = "") -> Sequence:
    return Sequence(Request(name, (1,), SamplingParams(), 0.0, tenant), random.Random(0))


def drain(queue: WaitingQueue) -> list[str]:
    names = []
    while queue:
        head = queue.head
        assert queue.pop() is head
        names.append(head.request_id)
    return names


def test_one_tenant_is_a_plain_queue():
    queue = WaitingQueue()
    for name in "abcd":
        queue.append(make(name))
    assert [sequence.request_id for sequence in queue] == list("abcd")
    assert drain(queue) == list("abcd")


def test_tenants_take_turns_and_a_latecomer_is_next_but_one():
    queue = WaitingQueue()
    for name in ("a1", "a2", "a3", "a4"):
        queue.append(make(name, "a"))
    queue.append(make("b1", "b"))
    queue.append(make("b2", "b"))
    queue.append(make("c1", "c"))
    assert drain(queue) == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_the_preempted_go_first_and_cost_no_turn():
    queue = WaitingQueue()
    queue.append(make("a1", "a"))
    queue.append(make("b1", "b"))
    queue.put_back(make("b0", "b"))
    queue.put_back(make("c0", "c"))
    assert drain(queue) == ["c0", "b0", "a1", "b1"]


def test_remove_takes_out_of_any_place_and_keeps_the_turns():
    queue = WaitingQueue()
    sequences = {name: make(name, name[0]) for name in ("a1", "a2", "b1", "c1")}
    for sequence in sequences.values():
        queue.append(sequence)
    back = make("d1", "d")
    queue.put_back(back)
    queue.remove(sequences["a1"])
    queue.remove(back)
    queue.remove(sequences["b1"])
    with pytest.raises(ValueError):
        queue.remove(sequences["b1"])
    assert len(queue) == 2
    assert drain(queue) == ["a2", "c1"]


def test_a_flood_of_one_key_does_not_hold_up_another():
    bench = Bench(max_num_seqs=2, max_queue_len=100)
    for num in range(40):
        bench.submit(f"flood{num}", max_tokens=4, tenant="flood")
    for _ in range(3):
        bench.engine.step()
    for num in range(3):
        bench.submit(f"calm{num}", max_tokens=4, tenant="calm")
    bench.run()
    order = [output.request_id for step in bench.steps for output in step if output.finish_reason]
    # Two running ahead of it, and one of the flood between each two of its own.
    assert max(order.index(f"calm{num}") for num in range(3)) < 9
    bench.assert_clean()
    assert not bench.engine._active._num_of


def test_a_key_over_its_share_is_refused_while_another_gets_in():
    bench = Bench(max_num_seqs=2, max_queue_len=10)
    for num in range(6):
        bench.submit(f"a{num}", max_tokens=2, tenant="a")
    with pytest.raises(ShareFullError, match="6 requests of this API key") as caught:
        bench.submit("a6", max_tokens=2, tenant="a")
    assert caught.value.num_finishes == 1
    for num in range(3):
        bench.submit(f"b{num}", max_tokens=2, tenant="b")
    with pytest.raises(ShareFullError):
        bench.submit("b3", max_tokens=2, tenant="b")
    with pytest.raises(ShareFullError) as caught:
        bench.submit("a6", max_tokens=2, tenant="a")
    assert caught.value.num_finishes == 4, "6 held, 3 free"
    assert bench.engine._active._num_of == {"a": 6, "b": 3}
    assert Counter(request.tenant for request in bench.engine._active) == {"a": 6, "b": 3}
    bench.run()
    bench.submit("a6", max_tokens=2, tenant="a")
    bench.run()
    bench.assert_clean()


def test_the_whole_queue_full_is_no_ones_share():
    bench = Bench(max_num_seqs=1, max_queue_len=2)
    for tenant in "abc":
        bench.submit(tenant, tenant=tenant)
    with pytest.raises(QueueFullError) as caught:
        bench.submit("d", tenant="d")
    assert not isinstance(caught.value, ShareFullError)

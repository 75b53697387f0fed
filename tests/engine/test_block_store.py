"""Blocks beyond the pool: stored once, found by their tokens, after evictions and restarts.

The fake runner checks of every block that is read that it holds the tokens of its own beginning.
"""

from __future__ import annotations

import random

import pytest

from autotp_serving.block_transfer import BlockTransfer
from autotp_serving.engine import block_store
from autotp_serving.engine.block_store import BlockStore
from autotp_serving.engine.scheduler import Scheduler
from tests.engine.test_scheduler import Bench, output, reference
from tests.fakes import FakeRunner


class StoringBench(Bench):
    """A bench whose runner has files; `restart` begins anew with what they hold."""

    def __init__(self, num_slots: int = 64, num_blocks: int = 64, **settings) -> None:
        super().__init__(num_blocks, **settings)
        self.runner.stored_blocks = [(slot, b"") for slot in range(num_slots)]
        self._begin(self.scheduler._config)

    def _begin(self, config) -> None:
        runner = self.runner
        self.scheduler = Scheduler(
            config, runner.num_blocks, runner.block_size, frozenset(),
            make_store=lambda: BlockStore(runner.stored_blocks, runner.transfer),
        )  # fmt: skip

    @property
    def store(self) -> BlockStore:
        store = self.scheduler.blocks.store
        assert store is not None
        return store

    def save(self) -> None:
        while self.store.has_unsaved:
            self.store.store()

    def restart(self) -> None:
        self.settle()
        files = self.runner.files
        num_slots = len(self.runner.stored_blocks)
        self.runner = FakeRunner(self.runner.num_blocks, self.runner.block_size)
        self.runner.files = files
        keys = {slot: key for slot, (key, _) in files.items()}
        self.runner.stored_blocks = [(slot, keys.get(slot, b"")) for slot in range(num_slots)]
        self._begin(self.scheduler._config)

    def count_computed(self) -> int:
        return sum(sum(batch.query_lens) for batch in self.runner.batches)


def test_a_transfer_survives_the_wire():
    key = bytes(range(32))
    transfer = BlockTransfer([3], [(1, 2, key)], [(4, 5, key[::-1]), (6, 7, key)])
    for one in (transfer, BlockTransfer()):
        assert BlockTransfer.is_one(one.to_bytes())
        assert BlockTransfer.from_bytes(one.to_bytes()) == one


def test_a_restart_computes_only_what_is_not_stored():
    bench = StoringBench()
    first = bench.add("a", 42, max_tokens=4)
    bench.run()
    bench.save()
    bench.restart()
    second = bench.add("b", 42, max_tokens=4)
    bench.run()
    assert output(second) == output(first) == reference(first)
    assert second.num_cached_tokens == 40
    assert bench.count_computed() == 2 + 3
    assert not bench.store.has_unsaved  # nothing is stored twice


def test_what_the_pool_has_no_room_for_comes_back():
    bench = StoringBench(num_blocks=12)
    for name in "aba":
        sequence = bench.add(name, [ord(name)] * 40, max_tokens=4)
        bench.run()
        bench.save()
    assert sequence.num_cached_tokens == 36
    assert output(sequence) == reference(sequence)


def test_old_blocks_make_room_and_damaged_ones_are_dropped():
    bench = StoringBench(num_slots=12)
    for name in "abc":
        bench.add(name, [ord(name)] * 18, max_tokens=1)
        bench.run()
        bench.save()
    slot_of = {key: slot for slot, (key, _) in bench.runner.files.items()}
    bench.restart()
    find = bench.scheduler.blocks.find_stored
    (*_, third) = keys = find([ord("c")] * 18, [], 18)
    assert len(keys) == 4 and len(find([ord("b")] * 18, [], 18)) == 4
    assert len(find([ord("a")] * 18, [], 18)) == 4
    bench.runner.damaged.add(slot_of[third])
    again = bench.add("d", [ord("c")] * 18, max_tokens=1)
    bench.run()
    assert again.num_cached_tokens == 12
    assert output(again) == reference(again)
    bench.save()  # computed, and so stored anew
    assert len(find([ord("c")] * 18, [], 18)) == 4


def test_blocks_of_a_sequence_that_gave_nan_are_not_stored():
    bench = StoringBench(next_token=lambda context, _: -1 if len(context) == 20 else 1)
    bench.add("a", 18, max_tokens=4)
    bench.step()
    bench.save()
    bench.run()
    bench.save()
    assert not bench.runner.files


def test_storing_takes_its_share_of_a_step_and_loading_must_pay(monkeypatch):
    """By a clock that the transfers move."""
    now = 0.0
    seconds_per_block = 0.1

    def transfer(one: BlockTransfer) -> list[int]:
        nonlocal now
        now += seconds_per_block * (len(one.stores) + len(one.loads))
        return []

    monkeypatch.setattr(block_store.time, "perf_counter", lambda: now)
    store = BlockStore([(slot, b"") for slot in range(4096)], transfer)
    for block in range(1000):
        store.note(block, block - 1 if block else None, [block] * 4)
    for _ in range(100):
        store.add_step(100, 1.0)  # 0.01 s a token
    assert 100 * block_store.STORE_SHARE <= now <= 100 * block_store.STORE_SHARE + 0.2
    keys = store.find([0] * 4 + [1] * 4, None, range(2), 4)
    for expected in (2, 0, 0):  # 0.1 s a block, not 0.04
        assert store.load([0, 1], keys, 4) == expected
    seconds_per_block = 0.001
    loaded = [store.load([0, 1], keys, 4) for _ in range(4 * block_store.RETRY_INTERVAL)]
    assert loaded[-2:] == [2, 2]  # it has been found out that it pays


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_with_files_restarts_and_damage(seed):
    rng = random.Random(seed)
    num_slots = rng.choice((12, 30, 200))
    bench = StoringBench(
        num_slots=num_slots,
        num_blocks=rng.choice((10, 16, 40)),
        max_num_seqs=rng.choice((2, 4)),
        max_num_batched_tokens=rng.choice((9, 16, 64)),
    )
    beginnings = [[rng.randrange(200) for _ in range(24)] for _ in range(2)]
    sequences = []
    num_loaded = 0
    while len(sequences) < 40 or bench.scheduler.has_work:
        if len(sequences) < 40 and rng.random() < 0.4:
            prompt = rng.choice(beginnings)[: rng.randrange(25)]
            prompt = prompt + [rng.randrange(200) for _ in range(rng.randrange(1, 5))]
            name = str(len(sequences))
            sequences.append(bench.add(name, prompt, max_tokens=rng.randrange(1, 10)))
        if sequences and rng.random() < 0.03:
            bench.scheduler.abort(rng.choice(sequences).request_id)
        bench.step()
        if bench.store.has_unsaved and rng.random() < 0.7:
            bench.store.store(rng.randrange(4))
        if rng.random() < 0.05 and bench.runner.files:
            bench.runner.damaged.add(rng.choice([*bench.runner.files]))
        if not bench.scheduler.has_work:
            num_loaded += bench.store.num_loaded
            bench.restart()
    for sequence in sequences:
        assert output(sequence) == reference(sequence)[: sequence.num_output_tokens]
    assert num_loaded > 0 or num_slots < 200

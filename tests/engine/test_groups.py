"""Several groups of ranks behind one door: who runs a request, and who takes over."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import pytest

from autotp_serving.config import ServingConfig
from autotp_serving.engine import EngineError, EngineGroups, QueueFullError, ShareFullError
from autotp_serving.request import Request, RequestError, RequestOutput, SamplingParams
from tests.engine.test_engine import Bench
from tests.fakes import ByteTokenizer, FakeRunner

PREFIX = "a beginning that several prompts share, four blocks of it long. "
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 7, "top_p": 0.9, "logprobs": 2},
    "penalized": {"temperature": 1.0, "seed": 1, "frequency_penalty": 0.5},
    "scored": {"prompt_logprobs": 3, "logprobs": 0},
    "held": {"min_tokens": 9, "stop": ("q",)},
    "late": {"temperature": 0.8, "seed": 3},
}


class GroupsBench(Bench):
    """Groups over fake runners, stepped by hand."""

    def __init__(self, num_groups: int = 2, num_blocks: int = 64, **settings: Any) -> None:
        self.steps: list[list[RequestOutput]] = []
        self.runners = [FakeRunner(num_blocks) for _ in range(num_groups)]
        config = ServingConfig(model_path="fake", **settings)
        self.groups = EngineGroups(
            self.runners, ByteTokenizer(), config, 512, self.steps.append, [self.fail] * num_groups
        )

    def fail(self, message: str) -> None:
        raise AssertionError(message)

    def submit(self, name: str, prompt: str = "hi", tenant: str = "", **params: Any) -> int:
        """Returns the group that it went to."""
        tokens = tuple(ByteTokenizer().encode(prompt))
        sampling = SamplingParams(**params)
        self.groups.submit(Request(name, tokens, sampling, time.monotonic(), tenant))
        return self.groups._placed[name].group

    def resume(self, group: int) -> None:
        """Have a group's ranks replaced."""

        def attach() -> None:
            self.runners[group] = self.engines[group]._runner = FakeRunner(64)

        self.engines[group].resume(attach)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            for engine in self.groups.engines:
                engine.step()
                engine.scheduler.check_integrity()

    def run(self) -> None:
        while self.groups._placed:
            self.step()
        self.step(3)  # what is still in flight

    def count(self) -> list[int]:
        """Requests of each group."""
        return [engine.stats().num_running + engine.stats().num_waiting for engine in self.engines]

    @property
    def engines(self) -> list[Any]:
        return self.groups.engines

    def collect(self, name: str) -> tuple[Any, ...]:
        """All that a request's client sees, joined."""
        outputs = self.outputs(name)
        logprobs = [one for output in outputs for one in output.logprobs]
        scores = [output.prompt_logprobs for output in outputs if output.prompt_logprobs]
        reason = self.last(name).finish_reason
        return self.text(name), self.tokens(name), logprobs, scores, reason

    def assert_clean(self) -> None:
        groups = self.groups
        assert groups._num_requests == groups._num_left == [0] * len(self.engines)
        assert not groups._placed and not len(groups._active)
        assert groups.stats().num_held_blocks == 0
        assert not any(engine._output_processor._detokenizers for engine in self.engines)
        assert not any(runner.kept for runner in self.runners)


def test_a_prompt_goes_where_its_beginning_is_cached_unless_others_are_long_before_it():
    bench = GroupsBench()
    assert bench.submit("one", PREFIX + "one", max_tokens=20) == 0
    assert bench.submit("other", "another prompt", max_tokens=20) == 1
    bench.run()
    assert bench.submit("two", "unknown", max_tokens=20) == 1, "its cache is less full"
    assert bench.submit("three", PREFIX + "three", max_tokens=20) == 0
    assert bench.submit("four", PREFIX + "four", max_tokens=60) == 0
    assert bench.submit("five", PREFIX + "five", max_tokens=60) == 0, "89 tokens left less 64"
    assert bench.submit("six", PREFIX + "six", max_tokens=60) == 1, "27 are fewer than 153 less 64"
    bench.run()
    assert [bench.last(name).num_cached_tokens for name in ("three", "five", "six")] == [64, 64, 0]
    bench.assert_clean()


def test_the_rest_goes_where_the_fewest_tokens_are_left():
    bench = GroupsBench(3)
    assert bench.submit("long", "x" * 30, max_tokens=100) == 0
    assert bench.submit("short", "y" * 30, max_tokens=20) == 1
    assert bench.submit("last", "z" * 30, max_tokens=30) == 2
    assert bench.submit("next", "v" * 10, max_tokens=10) == 1
    bench.step(12)  # that one has ended, and "short" has 8 left
    assert bench.submit("then", "w" * 10, max_tokens=5) == 1
    bench.run()
    assert bench.groups.stats().num_finished["length"] == 5
    bench.assert_clean()


def test_none_waits_while_another_group_has_room():
    bench = GroupsBench(max_num_seqs=2)
    for number in range(8):
        bench.submit(str(number), f"{number} prompt", max_tokens=200 if number % 2 else 10)
    assert sum(bench.count()) == 8 and bench.groups.stats().num_waiting == 8
    bench.step(60)  # the short ones have ended: three of the long ones would run in one group
    assert sorted(bench.count()) == [2, 2]
    assert bench.groups.stats().num_waiting == 0
    bench.run()
    for number in range(8):
        expected = Bench()
        expected.submit(str(number), f"{number} prompt", max_tokens=200 if number % 2 else 10)
        expected.run()
        assert bench.tokens(str(number)) == expected.tokens(str(number))
    bench.assert_clean()


@pytest.mark.parametrize("when", [0, 1, 2, 5, 9, 17])
@pytest.mark.parametrize("dying", [0, 1])
def test_a_dead_groups_sequences_go_on_at_another_token_for_token(when: int, dying: int):
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 40}
    calm, bench = Bench(**settings), GroupsBench(**settings)
    for name, params in KINDS.items():
        for one in (calm, bench):
            one.submit(name, f"{name}, and the beginning of all", max_tokens=24, **params)
    calm.run()
    bench.step(when)
    engine = bench.engines[dying]
    engine.lose("rank 0 has died")
    bench.step()
    assert bench.count()[dying] == 0 and bench.groups.outage is None
    bench.step(4)
    assert bench.submit("new", "while it is away", max_tokens=3) == 1 - dying
    bench.resume(dying)
    bench.run()
    for name in KINDS:
        expected = GroupsBench.collect(calm, name)  # type: ignore[arg-type]
        assert bench.collect(name) == expected, name
    assert bench.groups.stats().num_restarts == 1
    bench.assert_clean()


def test_requests_wait_while_no_group_is_left_and_the_first_that_comes_takes_all():
    bench = GroupsBench(max_num_seqs=2)
    for number in range(4):
        bench.submit(str(number), f"{number} prompt", max_tokens=30)
    bench.step(5)
    for engine in bench.engines:
        engine.lose(f"{engine.ranks_name} have died")
    bench.step(2)
    bench.submit("new", "during the outage", max_tokens=5)
    bench.step(2)
    assert sum(bench.count()) == 5
    assert bench.groups.outage == "The ranks of group 0 have died"
    bench.resume(1)
    bench.step(3)
    assert bench.count() == [0, 5] and bench.groups.outage is None
    bench.resume(0)
    bench.step(3)
    assert bench.count() == [2, 3] or bench.count() == [2, 2], "two run there, the others here"
    bench.run()
    assert bench.groups.stats().num_finished == {"stop": 0, "length": 5, "abort": 0, "error": 0}


def test_a_group_is_left_out_and_the_last_ends_the_server(caplog: pytest.LogCaptureFixture):
    bench = GroupsBench(3)
    for number in range(6):
        bench.submit(str(number), f"{number} prompt", max_tokens=20)
    bench.step(3)
    bench.engines[2].fail("the ranks have ended 6 times in a row")
    bench.step(2)
    assert [engine.status for engine in bench.engines] == ["ok", "ok", "failed"]
    assert bench.count() == [3, 3, 0] and bench.groups.failure is None
    lines = [record.message for record in caplog.records if "Left out" in record.message]
    assert lines == ["Left out, while other groups go on: the ranks have ended 6 times in a row"]
    bench.engines[0].lose("rank 0 has died")
    bench.engines[1].fail("the ranks have ended 6 times in a row")
    bench.step(2)
    assert bench.count() == [6, 0, 0], "where they wait for ranks that may come"
    bench.engines[0].fail("the ranks have ended 7 times in a row")
    assert bench.groups.failure == "the engine failed: the ranks have ended 7 times in a row"
    with pytest.raises(EngineError, match="7 times"):
        bench.submit("late")


def test_who_is_aborted_on_the_way_ends_where_it_arrives():
    bench = GroupsBench()
    group = bench.submit("a", max_tokens=50)
    bench.step(3)
    engine, other = bench.engines[group], bench.engines[1 - group]
    other.step()
    engine.lose("rank 0 has died")
    engine.step()  # it is in the other's inbox now
    bench.groups.abort("a")
    bench.step(2)
    assert bench.last("a").finish_reason == "abort"
    bench.groups.abort("a")
    bench.groups.abort("unknown")
    bench.submit("b", max_tokens=3)
    bench.step()
    bench.groups.abort("b")
    engine.lose("once more")
    bench.run()
    assert bench.last("b").finish_reason == "abort"


def test_the_queue_and_its_shares_are_of_all_groups_together():
    bench = GroupsBench(max_num_seqs=2, max_queue_len=4)
    for number in range(4):
        bench.submit(f"a{number}", tenant="a", max_tokens=9)
    with pytest.raises(ShareFullError):
        bench.submit("a4", tenant="a")
    bench.submit("b", tenant="b", max_tokens=9)
    bench.submit("c", tenant="c", max_tokens=9)
    for number in range(2):
        bench.submit(f"d{number}", max_tokens=9)
    with pytest.raises(QueueFullError):
        bench.submit("e", tenant="e")
    bench.run()
    with pytest.raises(RequestError, match="exceed"):
        bench.submit("f", max_tokens=511)
    assert bench.groups.stats().num_finished["length"] == 8
    bench.submit("a4", tenant="a", max_tokens=1)
    bench.run()
    bench.assert_clean()


def test_without_a_seed_groups_do_not_draw_alike():
    bench = GroupsBench()
    sent = [bench.submit(str(number), temperature=1.0, max_tokens=20) for number in range(2)]
    bench.run()
    assert sorted(sent) == [0, 1] and bench.tokens("0") != bench.tokens("1")


def count_hits(num_blocks: int) -> float:
    """Share of prompt tokens found in a cache, of 24 conversations, 6 at once, in 4 groups."""
    bench, draw = GroupsBench(4, num_blocks), random.Random(0)
    texts = [f"{number:02} tells a story. " + 3 * PREFIX for number in range(24)]
    for _ in range(24):
        some = draw.sample(range(len(texts)), 6)
        for number in some:
            bench.submit(str(number), texts[number], max_tokens=8)
        bench.run()
        for number in some:
            texts[number] += bench.text(str(number)) + " And then?"
        bench.steps.clear()
    stats = bench.groups.stats()
    return stats.num_prefix_hit_tokens / stats.num_prefix_query_tokens


def test_conversations_find_their_beginning_more_often_than_by_turns(
    monkeypatch: pytest.MonkeyPatch,
):
    ours = {num_blocks: count_hits(num_blocks) for num_blocks in (128, 512)}
    turns = itertools.count()
    monkeypatch.setattr(EngineGroups, "_choose", lambda _, a, cached: a[next(turns) % len(a)])
    by_turns = {num_blocks: count_hits(num_blocks) for num_blocks in (128, 512)}
    print(f"hits by number of blocks: {ours}, by turns {by_turns}")
    assert ours[128] > 1.3 * by_turns[128] and ours[512] > 1.3 * by_turns[512]

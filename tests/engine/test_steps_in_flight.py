"""What two steps in flight change, and what they must not. The other tests run with both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from autotp_serving.engine.sequence import draw_uniform, make_draw_key
from autotp_serving.request import SamplingParams
from tests.engine.test_engine import Bench
from tests.fakes import ByteTokenizer, FakeRunner, answers

EOS = ByteTokenizer.EOS


@pytest.fixture(params=[2], autouse=True)
def max_in_flight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(FakeRunner, "max_in_flight", request.param)
    return request.param


def num_known(bench: Bench) -> list[list[int]]:
    return [batch.num_known for batch in bench.runner.batches]


def test_the_next_step_begins_before_its_tokens_are_known():
    bench = Bench()
    bench.submit("a", prompt="xyz", max_tokens=4)
    bench.engine.step()
    assert num_known(bench) == [[3], [0]], "two begun, one collected"
    assert len(bench.tokens("a")) == 1
    bench.run()
    assert num_known(bench) == [[3], [0], [0], [0]], "nothing beyond the last token"
    bench.assert_clean()


@pytest.mark.parametrize("how", ["end token", "stop string", "abort", "invalid"])
def test_a_token_that_comes_late_is_dropped_and_its_blocks_wait_for_it(how):
    """The runner checks that no block is handed on before."""
    bench = Bench(FakeRunner(num_blocks=4, block_size=4))
    if how == "invalid":
        broken = list(b"helloAAA")
        bench.runner.next_token = lambda context, sample: -1 if context == broken else 65
    else:
        bench.runner.next_token = answers({"hello": "abc"})
    stop = ("bc",) if how == "stop string" else ()
    bench.submit("a", prompt="hello", max_tokens=9, stop=stop)
    bench.submit("next", prompt="other", max_tokens=9)
    while not bench.outputs("a") or bench.outputs("a")[-1].finish_reason is None:
        bench.engine.step()
        if how == "abort" and len(bench.tokens("a")) == 2:
            bench.engine.abort("a")
    assert bench.engine.scheduler.num_in_flight == 1
    assert bench.engine.stats().num_held_blocks > 0, "the late step may still write there"
    bench.run()
    expected = {"end token": "abc", "stop string": "a", "abort": "ab", "invalid": "AAA"}
    assert bench.text("a") == expected[how]
    assert len([one for one in bench.outputs("a") if one.finish_reason]) == 1
    assert bench.last("next").num_output_tokens == 9
    bench.assert_clean()


def test_what_depends_on_the_token_before_sits_out_until_that_is_here():
    """The runner checks that penalties see every token."""
    bench = Bench()
    bench.submit("penalized", max_tokens=5, presence_penalty=1.0)
    bench.submit("free", max_tokens=9)
    bench.run()
    with_both = [batch for batch in bench.runner.batches if batch.num_seqs == 2]
    assert len(bench.tokens("penalized")) == 5 and len(with_both) == 5
    assert all(known != 0 for batch in with_both for known in batch.num_known[:1])
    bench.assert_clean()


def test_bans_and_logprobs_do_not_wait():
    bench = Bench(FakeRunner(next_token=lambda context, sample: EOS))
    bench.submit("a", max_tokens=9, min_tokens=3, logprobs=2)
    bench.run()
    assert bench.tokens("a") == [ord("z")] * 3 + [EOS]
    assert num_known(bench) == [[2], [0], [0], [0], [0]], "the last came late"
    bench.assert_clean()


def test_nothing_is_preempted_while_a_step_is_in_flight():
    bench = Bench(FakeRunner(num_blocks=6, block_size=4), max_num_seqs=3)
    for name in "abc":
        bench.submit(name, prompt=name * 3, max_tokens=14)
    seen = 0
    while bench.engine.has_work:
        before = bench.engine.stats().num_preemptions
        bench.engine.step()
        seen += bench.engine.stats().num_preemptions > before
    assert seen
    bench.assert_clean()


def uniforms(seed: int) -> Iterator[float]:
    key = make_draw_key(seed, 0, 0)
    return (draw_uniform(key, position) for position in range(20_000))


def test_draws_are_uniform_independent_and_the_same_whoever_asks():
    first, second = list(uniforms(1)), list(uniforms(2))
    assert first == list(uniforms(1))
    assert all(0.0 <= number < 1.0 for number in first)
    for numbers in (first, second):
        counts = [0] * 100
        for number in numbers:
            counts[int(number * 100)] += 1
        chi_square = sum((count - 200) ** 2 / 200 for count in counts)
        assert 60 < chi_square < 150  # 99 degrees of freedom
    for one, other in ((first, second), (first, first[1:])):
        covariance = sum((a - 0.5) * (b - 0.5) for a, b in zip(one, other, strict=False))
        assert abs(covariance * 12) < 5 * len(other) ** 0.5


def test_a_greedy_request_draws_nothing_that_could_differ():
    bench = Bench()
    bench.submit("a", max_tokens=3)
    bench.run()
    assert {sample.uniform for sample in bench.runner.samples} == {0.0}
    assert bench.runner.samples[0].params == SamplingParams(max_tokens=3)

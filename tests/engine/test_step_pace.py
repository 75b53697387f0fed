"""Steps in which others stream end in time, by made-up times that the scheduler is told."""

from __future__ import annotations

import pytest

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.engine.scheduler import Step
from tests.engine.test_engine import Bench as EngineBench
from tests.engine.test_scheduler import Bench, output, reference, rows
from tests.fakes import FakeRunner

LIMITS = {"num_blocks": 400, "max_num_seqs": 4, "max_num_batched_tokens": 256}


def seconds_of(step: Step, decode_seconds: float = 0.02) -> float:
    """As on a CPU: the weights, and each token of a prompt with those before it."""
    spans = zip(step.batch.starts, step.batch.query_lens, strict=True)
    costs = (num * 2e-4 * (1 + start / 2000) for start, num in spans if num > 1)
    return decode_seconds + sum(costs)


def run_beside_a_stream(
    bench: Bench, num_tokens: int = 900, decode_seconds: float = 0.02
) -> list[tuple[int, float]]:
    """Tokens of a long prompt and seconds of each step that had some, while another streams."""
    bench.add("stream", [1, 2, 3], max_tokens=40)
    for _ in range(9):
        bench.scheduler.pace.add_step(bench.step(), decode_seconds)
    sequence, chunks = bench.add("long", num_tokens, max_tokens=2), []
    for step in bench.steps():
        seconds = seconds_of(step, decode_seconds)
        bench.scheduler.pace.add_step(step, seconds)
        assert rows(step).get("stream", 1) == 1
        if (query_len := rows(step).get("long", 0)) > 1:
            chunks.append((query_len, seconds))
    assert output(sequence) == reference(sequence)
    assert sum(num for num, _ in chunks) == num_tokens
    return chunks


def test_chunks_beside_a_stream_fill_the_time_and_hardly_more():
    """By a tenth at most: a chunk is sized by the last, which had fewer tokens before it."""
    chunks = run_beside_a_stream(Bench(max_step_ms=40, **LIMITS))
    assert chunks[0][0] == 64  # nothing is known of prompts yet
    for num_tokens, seconds in chunks[4:-1]:
        assert num_tokens % 16 == 0
        assert 0.034 <= seconds <= 0.044
    assert max(seconds for _, seconds in chunks) <= 0.044


def test_a_prompt_gets_on_where_decoding_alone_takes_too_long():
    chunks = run_beside_a_stream(Bench(max_step_ms=40, **LIMITS), 300, decode_seconds=0.08)
    assert {num for num, _ in chunks[4:-1]} == {16}


@pytest.mark.parametrize("settings", [{}, {"max_step_ms": 40.0}])
def test_nothing_is_held_back_without_a_limit_or_without_a_stream(settings):
    bench = Bench(**LIMITS, **settings)
    if not settings:
        assert [num for num, _ in run_beside_a_stream(bench)] == [255, 255, 255, 135]
        return
    bench.add("long", 500, max_tokens=1)
    bench.add("other", list(range(100, 112)), max_tokens=1)
    sizes = []
    for step in bench.steps():
        bench.scheduler.pace.add_step(step, seconds_of(step))
        sizes.append(step.num_tokens)
    assert sizes == [256, 256]


def test_a_limit_that_is_none_is_refused():
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="--max-step-ms must be above 0"):
            ServingConfig(model_path="fake", max_step_ms=value)


def test_the_engine_tells_what_steps_took(max_in_flight):
    runner, lens = FakeRunner(), []
    forward = runner.forward
    runner.forward = lambda batch: (lens.append(max(batch.query_lens)), forward(batch))
    bench = EngineBench(runner, max_num_seqs=2, max_step_ms=1e-3)
    bench.submit("stream", max_tokens=60)
    bench.engine.step()
    bench.submit("long", prompt="y" * 160, max_tokens=1)
    bench.run()
    chunks = [query_len for query_len in lens[1:] if query_len > 1]
    assert chunks[0] == 64 and chunks[-1] == 16 and sum(chunks) == 160

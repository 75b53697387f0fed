"""Logprobs of completions and prompts through the engine: chunks, cache, preemption, ends."""

from __future__ import annotations

from dataclasses import fields

import pytest

from autotp_serving.batch import MAX_SCORED_ROWS
from autotp_serving.request import RequestError, SamplingParams
from tests.engine.test_engine import Bench
from tests.fakes import ByteTokenizer, FakeRunner, logprobs

PROMPT = "shared beginning " * 3


def expected(tokens: list[int], first: int, num_top: int) -> list:
    """Logprobs of all tokens from index `first`, each from those before it."""
    return [logprobs(tokens[:end], tokens[end], num_top) for end in range(first, len(tokens))]


def test_answers_carry_one_per_token_where_asked():
    bench = Bench()
    for number, num_top in enumerate([None, 0, 3, None]):
        bench.submit(str(number), prompt=PROMPT, max_tokens=9, logprobs=num_top)
    bench.run()
    prompt = list(PROMPT.encode())
    for number, num_top in enumerate([None, 0, 3, None]):
        found = [one for output in bench.outputs(str(number)) for one in output.logprobs]
        if num_top is None:
            assert found == []
        else:
            tokens = prompt + bench.tokens(str(number))
            assert found == expected(tokens, len(prompt), num_top)
        assert all(output.prompt_logprobs is None for output in bench.outputs(str(number)))
    bench.assert_clean()


@pytest.mark.parametrize("max_num_batched_tokens", [5, 16, 1024])
def test_prompts_are_scored_whatever_the_chunks_the_cache_and_preemption(max_num_batched_tokens):
    bench = Bench(
        FakeRunner(num_blocks=14), max_num_seqs=3, max_num_batched_tokens=max_num_batched_tokens
    )
    prompts = [PROMPT + "x" * (7 * number) for number in range(9)]
    for number, prompt in enumerate(prompts):
        num_top = number % 3 if number % 4 else None
        bench.submit(str(number), prompt=prompt, max_tokens=60, prompt_logprobs=num_top)
    bench.run()
    for number, prompt in enumerate(prompts):
        outputs = bench.outputs(str(number))
        first, *others = outputs
        assert all(output.prompt_logprobs is None for output in others)
        if number % 4:
            tokens = list(prompt.encode())
            assert list(first.prompt_logprobs) == expected(tokens, 1, number % 3)
            assert first.num_cached_tokens == 0
        else:
            assert first.prompt_logprobs is None
        assert len(bench.tokens(str(number))) == 60
    stats = bench.engine.stats()
    assert stats.num_preemptions > 0 and stats.num_prefix_hit_tokens > 0
    bench.assert_clean()


def test_a_step_scores_no_more_rows_than_there_is_memory_for():
    """The fake runner counts them. A completion under way still gets a token in each step."""
    bench = Bench(FakeRunner(num_blocks=400), max_model_len=4096, max_num_batched_tokens=2048)
    long = "y" * (2 * MAX_SCORED_ROWS + 100)
    bench.submit("decode", max_tokens=12)
    bench.engine.step()
    for name in "ab":
        bench.submit(name, prompt=long, max_tokens=2, prompt_logprobs=1)
    bench.submit("c", prompt=long, max_tokens=2)
    bench.run()
    for name in "ab":
        assert list(bench.outputs(name)[0].prompt_logprobs) == expected(list(long.encode()), 1, 1)
    assert all(any(one.request_id == "decode" for one in step) for step in bench.steps[:12])
    bench.assert_clean()


@pytest.mark.parametrize("length", [1, 2, 40, MAX_SCORED_ROWS + 1, MAX_SCORED_ROWS + 2])
def test_a_prompt_may_be_scored_without_an_answer(length):
    bench = Bench(max_model_len=512)
    bench.submit("a", prompt="y" * length, max_tokens=0, prompt_logprobs=2)
    bench.submit("b", prompt="other", max_tokens=5)
    bench.run()
    (only,) = bench.outputs("a")
    assert (only.finish_reason, only.token_ids, only.num_output_tokens) == ("length", (), 0)
    assert list(only.prompt_logprobs) == expected([ord("y")] * length, 1, 2)
    assert bench.engine.stats().num_prompt_tokens == length + 5
    bench.assert_clean()


def test_invalid_numbers_in_a_prompt_end_its_request_alone():
    class Broken(FakeRunner):
        def collect(self):
            result = super().collect()
            for score in result.scores:
                score[-1] = type(score[-1])(score[-1].token_id, float("nan"))
            return result

    for max_num_batched_tokens in (10, 100):
        bench = Bench(Broken(), max_num_batched_tokens=max_num_batched_tokens)
        for max_tokens in (0, 3):
            bench.submit(str(max_tokens), "x" * 30, max_tokens=max_tokens, prompt_logprobs=0)
        bench.submit("good", prompt="other", max_tokens=5)
        bench.run()
        for name in ("0", "3"):
            (only,) = bench.outputs(name)
            assert only.finish_reason == "error" and "invalid numbers" in only.error
        assert bench.last("good").num_output_tokens == 5
        bench.assert_clean()


def test_min_tokens_keeps_end_tokens_and_stop_strings_away():
    """The fake model wants to end at once; a ban makes it say "z"."""

    def end(context, sample):
        return ByteTokenizer.EOS

    for params in ({}, {"stop": ("z",)}, {"stop_token_ids": (ord("z"),), "ignore_eos": True}):
        bench = Bench(FakeRunner(next_token=end))
        bench.submit("a", max_tokens=9, min_tokens=4, **params)
        bench.run()
        if "stop_token_ids" in params:
            assert bench.tokens("a") == [ByteTokenizer.EOS] * 9  # no end token is left to ban
        else:
            assert bench.tokens("a") == [ord("z")] * 4 + [ByteTokenizer.EOS]
            assert (bench.text("a"), bench.last("a").finish_reason) == ("zzzz", "stop")
        bench.assert_clean()


def test_special_tokens_show_where_asked():
    bench = Bench(FakeRunner(next_token=lambda context, sample: ByteTokenizer.EOS))
    for name, skip in (("a", True), ("b", False)):
        bench.submit(name, max_tokens=2, ignore_eos=True, skip_special_tokens=skip)
    bench.run()
    assert (bench.text("a"), bench.text("b")) == ("", "<end><end>")


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "prompt_logprobs": 0}, "max_tokens"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 101.0}}, "logit_bias"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"min_tokens": 33}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(params, field):
    with pytest.raises(RequestError) as refused:
        SamplingParams(**params)
    assert refused.value.field_name == field


@pytest.mark.parametrize("field", [one.name for one in fields(SamplingParams)])
def test_values_of_another_type_are_refused_by_name(field):
    for value in (object(), {"text": "text"}):
        with pytest.raises(RequestError) as refused:
            SamplingParams(**{field: value})
        assert refused.value.field_name == field


def test_bias_of_unknown_tokens_is_refused():
    with pytest.raises(RequestError) as refused:
        Bench().submit("a", logit_bias={ByteTokenizer.EOS + 1: 1.0})
    assert refused.value.field_name == "logit_bias"

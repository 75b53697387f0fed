"""Logprobs are log-softmax of the model's own logits, whatever else a request asks for."""

from __future__ import annotations

import math

import pytest
import torch

from autotp_serving.batch import INVALID_TOKEN, SampleInput, ScoreInput
from autotp_serving.devices.cpu import CpuDevice
from autotp_serving.request import SamplingParams, TokenLogprobs
from autotp_serving.worker.logprobs import ROWS_AT_ONCE, score_prompts
from autotp_serving.worker.sampler import Sampler
from autotp_serving.worker.step_logits import StepLogits

VOCAB_SIZE = 50

fetch = CpuDevice(0).fetch


def make_logits(num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(num_rows, VOCAB_SIZE, generator=generator) * 3).to(torch.bfloat16)


def assert_equals_log_softmax(found: TokenLogprobs, row: torch.Tensor, num_top: int) -> None:
    expected = row.double().log_softmax(-1)
    assert found.logprob == pytest.approx(expected[found.token_id].item(), abs=1e-5)
    assert len(found.top) == num_top
    values = [logprob for _, logprob in found.top]
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx(expected.topk(num_top).values.tolist(), abs=1e-5)
    for token, logprob in found.top:
        assert logprob == pytest.approx(expected[token].item(), abs=1e-5)


def test_sampled_tokens() -> None:
    logits = make_logits(6)
    asked = [None, 0, 3, 20, None, 1]
    samples = [
        SampleInput(
            SamplingParams(logprobs=num_top, temperature=row % 2, top_k=5, logit_bias={row: 50.0}),
            uniform=0.3,
            request_id=str(row),
        )
        for row, num_top in enumerate(asked)
    ]
    result = Sampler(fetch).sample(StepLogits(logits), samples).wait()
    for row, num_top in enumerate(asked):
        if num_top is None:
            assert result.logprobs[row] is None
        else:
            (found,) = result.logprobs[row]
            assert [found.token_id] == result.token_ids[row] == [row]
            assert_equals_log_softmax(found, logits[row], num_top)


def test_nobody_asks_nobody_pays() -> None:
    sampled = Sampler(fetch).sample(StepLogits(make_logits(2)), [SampleInput(SamplingParams())] * 2)
    assert sampled.wait().logprobs == ()


def test_a_row_of_nan_is_reported_and_harms_no_other() -> None:
    logits = make_logits(2).float()
    logits[0] = float("nan")
    samples = [SampleInput(SamplingParams(logprobs=2))] * 2
    result = Sampler(fetch).sample(StepLogits(logits), samples).wait()
    assert result.token_ids[0] == [INVALID_TOKEN]
    assert_equals_log_softmax(result.logprobs[1][0], logits[1], 2)


def test_prompts_of_several_sizes() -> None:
    lens = [1, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 3]
    logits = make_logits(sum(lens))
    scores = [
        ScoreInput([(7 * row) % VOCAB_SIZE for row in range(length)], num_top)
        for num_top, length in enumerate(lens)
    ]
    results = [score() for score in score_prompts(logits, scores, fetch)]
    row = 0
    for score, result in zip(scores, results, strict=True):
        assert [one.token_id for one in result] == score.target_ids
        for one in result:
            assert_equals_log_softmax(one, logits[row], score.num_top)
            row += 1


def test_the_likeliest_target_has_exactly_the_first_top_logprob() -> None:
    """lm-eval compares the two for equality to tell whether a text is greedy."""
    logits = make_logits(40)
    best = logits.argmax(-1).tolist()
    (score,) = score_prompts(logits, [ScoreInput(best, 1)], fetch)
    for one in score():
        assert one.logprob == one.top[0][1] and not math.isnan(one.logprob)

"""The sampler against transformers' own logits processors, and at its edges."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from autotp_serving.batch import INVALID_TOKEN, SampleInput
from autotp_serving.devices.cpu import CpuDevice
from autotp_serving.request import SamplingParams
from autotp_serving.worker.sampler import Sampler
from autotp_serving.worker.sampling import MANY_CANDIDATES
from autotp_serving.worker.step_logits import StepLogits
from tests.worker.chi_square import assert_follows

FETCH = CpuDevice(0).fetch

NUM_SAMPLES = 20_000
VOCAB_SIZE = 40
JUST_UNDER_1 = math.nextafter(1.0, 0.0)

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": VOCAB_SIZE + 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 0.05},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 5, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 3.0, "top_k": 20, "top_p": 0.9, "min_p": 0.3},
]


def make_logits(num_rows: int = 1, seed: int = 3) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def sample_tokens(logits: torch.Tensor, samples: list[SampleInput]) -> list[int]:
    return Sampler(FETCH).sample(StepLogits(logits), samples).token_ids.tolist()


def sample_one(logits: torch.Tensor, uniform: float, **params: float) -> int:
    """One sample from one row."""
    return sample_tokens(logits, [SampleInput(SamplingParams(**params), uniform)])[0]


def reference_probability(
    logits: torch.Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """What transformers' generate would sample from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.int64), logits.clone()).softmax(-1)[0].double()


def count_samples(logits: torch.Tensor, uniforms: list[float], **params: float) -> torch.Tensor:
    samples = [SampleInput(SamplingParams(**params), uniform) for uniform in uniforms]
    tokens = sample_tokens(logits.expand(len(uniforms), -1), samples)
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB_SIZE).double()


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_samples_follow_the_distribution_of_transformers(params: dict[str, float]) -> None:
    """Chi-square over 20,000 samples; tokens that transformers rules out must never come."""
    logits = make_logits()
    source = random.Random(11)
    counts = count_samples(logits, [source.random() for _ in range(NUM_SAMPLES)], **params)
    assert_follows(counts, reference_probability(logits, **params))


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_evenly_spread_uniforms_hit_each_token_as_often_as_it_is_likely(
    params: dict[str, float],
) -> None:
    """Sharper than chance allows: off by at most a sample or two."""
    logits = make_logits(seed=4)
    counts = count_samples(logits, [(i + 0.5) / NUM_SAMPLES for i in range(NUM_SAMPLES)], **params)
    expected = reference_probability(logits, **params) * NUM_SAMPLES
    assert (counts - expected).abs().max() <= 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_largest(dtype: torch.dtype) -> None:
    logits = make_logits(16).to(dtype)
    samples = [SampleInput(SamplingParams())] * 16
    assert sample_tokens(logits, samples) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "top_k": 1}], ids=str)
def test_of_equal_logits_greedy_takes_the_first(params: dict[str, float]) -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [9, 5, 30]] = 2.0
    assert sample_one(logits, 0.999, **params) == 5


def test_equal_logits_share_evenly() -> None:
    counts = count_samples(
        torch.zeros(1, VOCAB_SIZE),
        [(i + 0.5) / NUM_SAMPLES for i in range(NUM_SAMPLES)],
        temperature=1.0,
    )
    assert (counts - NUM_SAMPLES / VOCAB_SIZE).abs().max() <= 1.0


@pytest.mark.parametrize("params", [*SETTINGS, {"temperature": 100.0}], ids=str)
@pytest.mark.parametrize("uniform", [0.0, 1e-300, JUST_UNDER_1])
def test_the_ends_of_the_uniform_range_draw_possible_tokens(
    uniform: float, params: dict[str, float]
) -> None:
    logits = make_logits()
    possible = reference_probability(logits, **params) > 0
    token = sample_one(logits, uniform, **params)
    assert possible[token]
    if uniform < 0.5 and possible.sum() < VOCAB_SIZE and params.keys() & {"top_k", "top_p"}:
        assert token == logits.argmax()  # rows that are ranked begin with the most likely


def test_a_token_without_probability_is_never_sampled() -> None:
    logits = torch.full((1, VOCAB_SIZE), float("-inf"))
    logits[0, [3, 8]] = torch.tensor([1.0, 2.0])
    for uniform in (0.0, 0.5, JUST_UNDER_1):
        assert sample_one(logits, uniform, temperature=100.0) in (3, 8)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-6},
        {"temperature": 1e-300},
        {"temperature": 5e-324},
        {"temperature": 1.0, "top_p": 5e-324},
        {"temperature": 1.0, "top_k": 1},
    ],
    ids=str,
)
def test_settings_at_the_edge_of_greedy_are_greedy(params: dict[str, float]) -> None:
    logits = make_logits() * 1000
    for uniform in (0.0, 0.5, JUST_UNDER_1):
        assert sample_one(logits, uniform, **params) == logits.argmax()


def test_top_k_of_any_size_keeps_all() -> None:
    """A client may send any whole number; none may end the step, and with it the server."""
    logits = make_logits()
    expected = sample_one(logits, 0.7, temperature=1.0)
    for top_k in (2**31, 2**63, 10**400):
        assert sample_one(logits, 0.7, temperature=1.0, top_k=top_k) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "row",
    [
        [float("nan")] * VOCAB_SIZE,
        [float("nan"), *[0.0] * (VOCAB_SIZE - 1)],
        [*[0.0] * (VOCAB_SIZE - 1), float("nan")],
        [float("inf"), *[0.0] * (VOCAB_SIZE - 1)],
        [float("-inf")] * VOCAB_SIZE,
    ],
    ids=["all nan", "nan first", "nan last", "inf", "all -inf"],
)
def test_rows_that_are_not_numbers_are_reported_and_harm_no_other(
    row: list[float], temperature: float
) -> None:
    good = make_logits(2)
    logits = torch.cat([good[:1], torch.tensor([row]), good[1:]])
    sample = SampleInput(SamplingParams(temperature=temperature), 0.4)
    first, last = sample_tokens(good, [sample] * 2)
    assert sample_tokens(logits, [sample] * 3) == [first, INVALID_TOKEN, last]


def test_a_choice_does_not_depend_on_its_neighbours() -> None:
    """Each row alone, all together, and in another order, with mixed settings."""
    source = random.Random(5)
    samples = [
        SampleInput(SamplingParams(**(params if index % 4 else {})), source.random())
        for index, params in enumerate(SETTINGS * 3)
    ]
    num_rows = len(samples)
    logits = make_logits(num_rows).to(torch.bfloat16)
    alone = [sample_tokens(logits[i : i + 1], samples[i : i + 1])[0] for i in range(num_rows)]
    assert sample_tokens(logits, samples) == alone
    order = source.sample(range(num_rows), num_rows)
    assert sample_tokens(logits[order], [samples[i] for i in order]) == [alone[i] for i in order]
    assert len(set(alone)) > 3


def test_half_precision_logits_are_drawn_from_in_float32() -> None:
    logits = make_logits().to(torch.bfloat16)
    for index in range(50):
        uniform = (index + 0.5) / 50
        assert sample_one(logits, uniform, temperature=1.0) == sample_one(
            logits.float(), uniform, temperature=1.0
        )


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 9.0, "top_p": 0.95},
        {"temperature": 9.0, "top_k": 5, "top_p": 0.95},
        {"temperature": 9.0, "top_k": 64},
        {"temperature": 9.0, "top_k": 65, "top_p": 0.8},
        {"temperature": 9.0, "top_k": 2500},
        {"temperature": 9.0, "top_k": 2500, "top_p": 0.9},
    ],
    ids=str,
)
def test_a_vocabulary_of_more_than_the_candidates(params: dict[str, float]) -> None:
    """Flat distributions reach past the likeliest tokens, and neighbours do not."""
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(1)) * 2
    assert logits.shape[1] > 2 * MANY_CANDIDATES
    samples = [
        SampleInput(SamplingParams(**params), (i + 0.5) / NUM_SAMPLES)
        for i in range(0, NUM_SAMPLES, 200)
    ]
    samples += [SampleInput(SamplingParams(temperature=1.0, top_k=3), 0.5)] * 3
    tokens = sample_tokens(logits.expand(len(samples), -1), samples)[:-3]
    possible = reference_probability(logits, **params)
    ranks = logits[0].argsort(descending=True, stable=True)
    edges = possible[ranks].cumsum(0)
    for token, sample in zip(tokens, samples, strict=False):
        expected = ranks[torch.searchsorted(edges, sample.uniform, right=True)]
        assert possible[token] > 0
        assert (edges[ranks == token] - edges[ranks == expected]).abs() < 1e-3

"""What ranks send of their logits gives the tokens and logprobs of whole rows, to the last bit."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

from autotp_serving.batch import INVALID_TOKEN, Batch, SampleInput, ScoreInput, StepResult
from autotp_serving.devices.cpu import CpuDevice
from autotp_serving.layers.head import VocabParallelHead
from autotp_serving.request import SamplingParams
from autotp_serving.worker import step_logits
from autotp_serving.worker.sampler import Sampler
from autotp_serving.worker.sampling import sample_tokens
from autotp_serving.worker.step_logits import (
    NUM_SENT,
    LogitsGatherer,
    StepLogits,
    find_clear_rows,
)

FETCH = CpuDevice(0).fetch
HIDDEN = 8
VOCAB_SIZE = 1001
"""Divides evenly by none of 2, 3 and 4."""

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 1.0, "top_k": 64},
    {"temperature": 1.0, "top_k": 65},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 50, "min_p": 0.05, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.0, "logprobs": 5},
    {"temperature": 1.0, "top_k": 5, "logprobs": 0},
    {"temperature": 0.0, "logit_bias": {7: 100.0}},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "top_k": 8, "min_tokens": 1},
]


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the few logits here would be gathered whole."""
    monkeypatch.setattr(step_logits, "SMALL_BYTES", 0)


class Ranks:
    """Threads that sum tensors as ranks do, and note how large these were."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.sent: list[int] = []
        self._barrier = threading.Barrier(num_ranks, timeout=60)
        self._given: list[torch.Tensor | None] = [None] * num_ranks

    def all_reduce(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place."""
        if rank == 0:
            self.sent.append(tensor.nbytes)
        self._given[rank] = tensor.clone()
        self._barrier.wait()
        total = sum(self._given[1:], self._given[0])
        self._barrier.wait()
        return tensor.copy_(total)

    def gather(self, logits: torch.Tensor, batch: Batch, by_candidates: bool) -> StepLogits:
        """What rank 0 gets of a step whose logits are these."""
        found: list[StepLogits | None] = [None] * self.num_ranks

        def run(rank: int) -> None:
            head = VocabParallelHead(
                HIDDEN, logits.shape[1], False, logits.dtype, rank, self.num_ranks,
                lambda tensor: self.all_reduce(rank, tensor),
            )  # fmt: skip
            gatherer = LogitsGatherer(head, by_candidates=by_candidates)
            own = logits[:, head.start : head.stop].clone()
            found[rank] = gatherer(head.gather(own) if head.gathers else own, batch)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found[0] is not None
        return found[0]


def make_batch(samples: list[SampleInput], num_scored: int = 0) -> Batch:
    num_seqs = len(samples)
    num_top = [0 if one.allowed else one.params.num_top_logits for one in samples]
    ones = [1] * num_seqs
    return Batch(
        list(range(num_seqs)), ones, ones, ones, ones, sampled=list(range(num_seqs)),
        num_top=[] if num_top == ones else num_top, score_rows=list(range(num_scored)),
    )  # fmt: skip


def sample_over_ranks(
    num_ranks: int,
    logits: torch.Tensor,
    samples: list[SampleInput],
    scores: list[ScoreInput],
    by_candidates: bool = True,
) -> tuple[StepResult, list[int]]:
    ranks = Ranks(num_ranks)
    batch = make_batch(samples, len(logits) - len(samples))
    gathered = ranks.gather(logits, batch, by_candidates)
    return Sampler(FETCH).sample(gathered, samples, scores).wait(), ranks.sent


def make_samples(rng: random.Random, count: int) -> list[SampleInput]:
    """Rows of any kind; some with penalties, some with a mask."""
    samples = []
    for number in range(count):
        params = SamplingParams(**rng.choice(KINDS))
        allowed = None
        if rng.random() < 0.1:
            allowed = bytes(rng.randrange(256) for _ in range(VOCAB_SIZE // 8 + 1))
        tokens = [rng.randrange(VOCAB_SIZE) for _ in range(9)]
        banned = (3, 4) if params.min_tokens else ()
        samples.append(SampleInput(params, rng.random(), str(number), tokens, 4, banned, allowed))
    return samples


def make_coarse(rng: random.Random, num_rows: int) -> torch.Tensor:
    """Logits with many equal ones, as bfloat16 has, on both sides of where slices meet."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=generator) * rng.choice([0.5, 3.0, 12.0])
    if rng.random() < 0.5:
        logits = (logits * 4).round() / 4
    return logits.to(rng.choice([torch.bfloat16, torch.float32, torch.float16]))


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_any_mixture_of_rows(num_ranks: int, seed: int) -> None:
    rng = random.Random(1000 * num_ranks + seed)
    samples = make_samples(rng, rng.randint(1, 12))
    num_scored = rng.choice([0, 0, 3])
    logits = make_coarse(rng, len(samples) + num_scored)
    scores = [ScoreInput([5, 900, 0], 2)] if num_scored else []
    expected = Sampler(FETCH).sample(StepLogits(logits.clone()), samples, scores).wait()
    assert sample_over_ranks(num_ranks, logits, samples, scores)[0] == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_of_equal_logits_the_lowest_token_wins(num_ranks: int) -> None:
    logits = torch.zeros(4, VOCAB_SIZE, dtype=torch.bfloat16)
    logits[1, [333, 334, 500, 501]] = 2.0
    logits[2] = -1.0
    logits[2, [1000, 700]] = -0.0
    logits[2, 900] = 0.0
    logits[3, 250:] = 7.0
    result, _ = sample_over_ranks(num_ranks, logits, [SampleInput(SamplingParams())] * 4, [])
    assert result.token_ids == [[0], [333], [700], [250]]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_harm_their_own_row_alone(num_ranks: int, value: float) -> None:
    for params in ({}, {"temperature": 1.0, "top_k": 5}):
        samples = [SampleInput(SamplingParams(**params), 0.5)] * 3
        logits = make_coarse(random.Random(4), 3)
        expected = Sampler(FETCH).sample(StepLogits(logits.clone()), samples).wait().token_ids
        if value > 0 or value != value:
            logits[1, 700] = value
        else:
            logits[1] = value
        found = sample_over_ranks(num_ranks, logits, samples, [])[0].token_ids
        assert found == [expected[0], [INVALID_TOKEN], expected[2]]


@pytest.mark.parametrize("top_k", [2, 40, 64])
def test_equal_logits_at_the_edge_of_top_k_take_whole_rows(top_k: int) -> None:
    """Which of them `topk` would take of a whole row, it alone knows."""
    logits = torch.linspace(10, -10, VOCAB_SIZE).expand(20, -1).clone()
    logits[::2, top_k - 1 : 80] = logits[0, top_k - 1].clone()
    params = SamplingParams(temperature=100.0, top_k=top_k)
    samples = [SampleInput(params, row / 20) for row in range(20)]
    expected = Sampler(FETCH).sample(StepLogits(logits.clone()), samples).wait()
    found, sent = sample_over_ranks(2, logits, samples, [])
    assert found == expected
    assert sent == [2 * 2 * 20 * NUM_SENT * 4, 10 * VOCAB_SIZE * 4]


@pytest.mark.parametrize("temperature", [1e-9, 0.3, 1.0, 1.7, 100.0])
def test_clear_rows_are_so_at_any_temperature(temperature: float) -> None:
    """Neighbouring floats may meet when they are divided: such rows are not clear."""
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(200, 1, generator=generator).abs()
    steps = torch.arange(NUM_SENT) * torch.logspace(-9, -1, 200)[:, None]
    values = 20 - base - steps
    clear = find_clear_rows(values, [NUM_SENT - 1] * 200)
    assert 0 < len(clear) < 200
    below = (values - values[:, :1]) / max(temperature, 1e-6)
    assert all(below[row, -2] > below[row, -1] for row in clear)


def test_only_what_is_needed_is_sent() -> None:
    logits = make_coarse(random.Random(1), 8)
    plain = SampleInput(SamplingParams())
    _, sent = sample_over_ranks(2, logits, [plain] * 8, [])
    assert sent == [2 * 2 * 8 * 4]
    asks = SampleInput(SamplingParams(logprobs=1))
    _, sent = sample_over_ranks(2, logits, [plain] * 7 + [asks], [])
    assert sent == [2 * 2 * 7 * 4, VOCAB_SIZE * logits.itemsize]
    _, sent = sample_over_ranks(2, logits[:0], [], [])
    assert sent == []
    _, sent = sample_over_ranks(2, logits, [plain] * 8, [], by_candidates=False)
    assert sent == [8 * VOCAB_SIZE * logits.itemsize]


def test_where_whole_rows_are_small_they_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_coarse(random.Random(1), 2)
    samples = [SampleInput(SamplingParams())] * 2
    expected, _ = sample_over_ranks(2, logits, samples, [])
    monkeypatch.setattr(step_logits, "SMALL_BYTES", logits.nbytes)
    assert sample_over_ranks(2, logits, samples, []) == (expected, [logits.nbytes])


def test_a_vocabulary_with_too_few_tokens_for_each_rank_is_gathered() -> None:
    """Slices of 64 and fewer tokens have no NUM_SENT largest."""
    logits = torch.randn(3, 4 * 64 + 3)
    samples = [SampleInput(SamplingParams(temperature=1.0, top_k=60), 0.2)] * 3
    expected = Sampler(FETCH).sample(StepLogits(logits.clone()), samples).wait()
    found, sent = sample_over_ranks(4, logits, samples, [])
    assert found == expected
    assert sent == [logits.nbytes]


@pytest.mark.parametrize("params", KINDS)
def test_one_number_says_what_a_request_needs(params: dict[str, Any]) -> None:
    count = SamplingParams(**params).num_top_logits
    if params == {}:
        assert count == 1
    elif set(params) <= {"temperature", "top_k", "top_p", "min_p"} and params.get("top_k", 0) in (
        range(1, NUM_SENT)
    ):
        assert count == max(2, params["top_k"])
    else:
        assert count == 0


def test_whole_rows_are_sampled_as_ever() -> None:
    """The way without candidates is `sample_tokens` itself."""
    logits = make_coarse(random.Random(8), 5).float()
    samples = [SampleInput(SamplingParams(temperature=0.8, top_k=9), row / 5) for row in range(5)]
    expected = sample_tokens(logits.clone(), samples).tolist()
    found, _ = sample_over_ranks(1, logits, samples, [])
    assert found.token_ids == [[token] for token in expected]

"""Penalties, bias, bans and masks against transformers' processors and OpenAI's formula."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from autotp_serving.batch import SampleInput
from autotp_serving.devices.cpu import CpuDevice
from autotp_serving.request import SamplingParams
from autotp_serving.worker.logits_processors import TokenCounts
from autotp_serving.worker.sampler import Sampler
from autotp_serving.worker.step_logits import StepLogits
from tests.worker.chi_square import assert_follows

FETCH = CpuDevice(0).fetch

NUM_SAMPLES = 20_000
VOCAB_SIZE = 40
PROMPT = [3, 5, 5, 8, 30]
ANSWER = [5, 9, 9, 9, 12]


def sample_tokens(logits: torch.Tensor, samples: list[SampleInput]) -> list[int]:
    return Sampler(FETCH).sample(StepLogits(logits), samples).token_ids.tolist()


def make_logits(num_rows: int = 1, seed: int = 3) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


END = int(make_logits().argmax())


def make_sample(uniform: float, request_id: str = "a", **params) -> SampleInput:
    """A sample after PROMPT and ANSWER."""
    sampling = SamplingParams(**({"temperature": 1.0} | params))
    bans = (END,) if len(ANSWER) < sampling.min_tokens else ()
    tokens = [*PROMPT, *ANSWER]
    return SampleInput(sampling, uniform, request_id, tokens, len(PROMPT), bans)


def openai_penalties(frequency: float, presence: float):
    """The formula of OpenAI's documentation; transformers has no such processor."""

    def process(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(torch.tensor(ANSWER), minlength=VOCAB_SIZE)
        return logits - counts * frequency - (counts > 0).float() * presence

    return process


SETTINGS = [
    ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
    ({"repetition_penalty": 0.6}, [RepetitionPenaltyLogitsProcessor(0.6)]),
    ({"frequency_penalty": 0.7}, [openai_penalties(0.7, 0.0)]),
    ({"frequency_penalty": -1.5}, [openai_penalties(-1.5, 0.0)]),
    ({"presence_penalty": 1.9}, [openai_penalties(0.0, 1.9)]),
    (
        {"logit_bias": {4: 3.5, 12: -100.0}},
        [SequenceBiasLogitsProcessor({(4,): 3.5, (12,): -100.0})],
    ),
    ({"min_tokens": 6}, [MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, END)]),
    ({"min_tokens": 5}, [MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, END)]),
    (
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.4},
        [RepetitionPenaltyLogitsProcessor(1.3), openai_penalties(0.5, 0.4)],
    ),
    (
        {"logit_bias": {9: 4.0}, "repetition_penalty": 2.0, "temperature": 0.7, "top_k": 9},
        [
            SequenceBiasLogitsProcessor({(9,): 4.0}),
            RepetitionPenaltyLogitsProcessor(2.0),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(9),
        ],
    ),
]


@pytest.mark.parametrize(("params", "processors"), SETTINGS, ids=[str(one) for one, _ in SETTINGS])
def test_samples_follow_the_distribution_of_transformers(params, processors) -> None:
    logits = make_logits()
    source = random.Random(17)
    samples = [make_sample(source.random(), **params) for _ in range(NUM_SAMPLES)]
    # A step has one row per request; this one has one request in all rows, counted once.
    tokens = sample_tokens(logits.expand(NUM_SAMPLES, -1), samples)
    context = torch.tensor([PROMPT + ANSWER])
    expected = LogitsProcessorList(processors)(context, logits.clone()).softmax(-1)[0]
    assert_follows(torch.bincount(torch.tensor(tokens), minlength=VOCAB_SIZE), expected)
    plain = logits.softmax(-1)[0]
    if params != {"min_tokens": 5}:
        with pytest.raises(AssertionError):  # the setting makes a difference, and the test sees it
            assert_follows(torch.bincount(torch.tensor(tokens), minlength=VOCAB_SIZE), plain)


def test_counts_grow_token_by_token_as_if_counted_at_once() -> None:
    """Requests come and go; whoever takes over a row begins at zero."""
    source = random.Random(2)
    counts = TokenCounts(VOCAB_SIZE, torch.device("cpu"))
    active: dict[str, SampleInput] = {}
    for number in range(200):
        if len(active) < 7:
            prompt = [source.randrange(VOCAB_SIZE) for _ in range(source.randint(1, 9))]
            sample = SampleInput(SamplingParams(), 0.0, str(number), prompt, len(prompt))
            active[str(number)] = sample
        for name in source.sample(sorted(active), min(2, len(active))):
            counts.release(name)
            del active[name]
        rows = source.sample(list(active.values()), min(3, len(active)))
        if rows:
            generated, present = counts.update(rows)
            for row, sample in enumerate(rows):
                output = torch.tensor(sample.token_ids[sample.num_prompt_tokens :], dtype=int)
                assert generated[row].tolist() == output.bincount(minlength=VOCAB_SIZE).tolist()
                assert set(present[row].nonzero().flatten().tolist()) == set(sample.token_ids)
        for sample in rows:
            sample.token_ids.append(source.randrange(VOCAB_SIZE))
        assert counts.num_requests <= len(active)
    assert len(counts._counts) <= 8


def test_drafts_count_for_their_own_samples() -> None:
    counts = TokenCounts(VOCAB_SIZE, torch.device("cpu"))
    sample = make_sample(0.5, frequency_penalty=1.0)
    for _ in range(2):  # a draft that was refused leaves nothing behind
        ahead = [sample, replace(sample, drafts=(9, 7)), replace(sample, drafts=(7, 9, 7))]
        found, is_present = counts.update(ahead)
        for row, one in enumerate(ahead):
            text = torch.tensor([*ANSWER, *one.drafts])
            assert torch.equal(found[row], torch.bincount(text, minlength=VOCAB_SIZE).int())
            assert is_present[row].nonzero().flatten().tolist() == sorted({*PROMPT, *text.tolist()})


def test_a_released_request_leaves_nothing() -> None:
    sampler = Sampler(FETCH)
    logits = make_logits(3)
    samples = [make_sample(0.5, name, frequency_penalty=1.0, logit_bias={1: 2.0}) for name in "abc"]
    sampler.sample(StepLogits(logits), samples)
    processors = sampler._logits_processors
    assert processors._counts.num_requests == len(processors._biases) == 3
    for name in "abcd":
        sampler.release(name)
    assert processors._counts.num_requests == len(processors._biases) == 0


def pack(allowed: set[int], num_bits: int) -> bytes:
    words = [0] * -(-num_bits // 32)
    for token in allowed:
        words[token // 32] |= 1 << token % 32
    return array("I", words).tobytes()


@pytest.mark.parametrize("num_bits", [32, VOCAB_SIZE, 70])
def test_masks_let_only_their_tokens_through(num_bits: int) -> None:
    """Also where the tokenizer has fewer or more tokens than the model."""
    masks = [{31}, {0, 5, 31}, set(range(32)), {2, 30, 31}]
    logits = make_logits(9)
    samples = []
    for row in range(9):
        mask = pack(masks[row % 4], num_bits) if row % 2 else None
        temperature = 1.0 if row % 3 else 0.0
        samples.append(SampleInput(SamplingParams(temperature=temperature), 0.99, allowed=mask))
    together = sample_tokens(logits, samples)
    for row, token in enumerate(together):
        assert token == sample_tokens(logits[row : row + 1], [samples[row]])[0]
        if row % 2:
            assert token in masks[row % 4]
    assert together[0] == logits[0].argmax()


def test_a_greedy_row_obeys_its_mask_and_its_neighbour_has_none() -> None:
    logits = make_logits(2)
    best = logits.argmax(-1).tolist()
    allowed = set(range(VOCAB_SIZE)) - {best[0]}
    samples = [
        SampleInput(SamplingParams(), allowed=pack(allowed, VOCAB_SIZE)),
        SampleInput(SamplingParams()),
    ]
    assert sample_tokens(logits, samples) == [
        logits[0].topk(2).indices[1],
        best[1],
    ]


def test_a_ban_beyond_the_models_vocabulary_bans_nothing() -> None:
    sample = SampleInput(SamplingParams(min_tokens=1), banned=(VOCAB_SIZE, 10**6))
    logits = make_logits()
    assert sample_tokens(logits, [sample]) == [logits.argmax()]


def test_choices_do_not_depend_on_neighbours() -> None:
    """Penalties, bias, masks and plain rows side by side, alone and in another order."""
    source = random.Random(9)
    settings = [params for params, _ in SETTINGS] + [{}, {"temperature": 0.0}]
    samples = [
        make_sample(source.random(), str(number), **settings[number % len(settings)])
        for number in range(36)
    ]
    logits = make_logits(36).to(torch.bfloat16)
    alone = [sample_tokens(logits[i : i + 1], samples[i : i + 1])[0] for i in range(36)]
    assert sample_tokens(logits, samples) == alone
    order = source.sample(range(36), 36)
    mixed = sample_tokens(logits[order], [samples[i] for i in order])
    assert mixed == [alone[i] for i in order]

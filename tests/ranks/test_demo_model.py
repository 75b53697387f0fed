"""The embedded model in bfloat16, requests arriving at random, at 1 to 3 ranks."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from autotp_serving.engine.tokenizer import HuggingFaceTokenizer
from tests.ranks.launch import ROOT, run_program

DEMO = ROOT / "demo_model"
NUM_PROMPTS = 40
MAX_TOKENS = 16

# Logits near 20 lie 0.125 apart in bfloat16; two sums of a layer's parts may differ by a few steps.
BFLOAT16_NOISE = 0.5

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """40 questions; every eighth comes after 1,000 to 1,300 tokens of other entries."""
    tokenizer = HuggingFaceTokenizer(DEMO)
    sample = json.loads((DEMO / "recall_sample.json").read_text())["random"]
    rng = random.Random(11)
    found = []
    for number in range(NUM_PROMPTS):
        question = rng.choice(sample)["question"]
        text = question
        if number % 8 == 0:
            length = rng.randint(1000, 1300)
            while len(tokenizer.encode(text)) < length:
                other = rng.choice(sample)
                text = f"{other['question']} {other['answer']}\n\n{text}"
        found.append(tokenizer.encode(text))
    return found


@pytest.fixture(scope="module")
def find_gaps() -> Callable[..., torch.Tensor]:
    """By how much each token of an answer misses the whole model's best logit after the same text.

    Most answers are those of every number of ranks, and computed once.
    """
    model = AutoModelForCausalLM.from_pretrained(DEMO, torch_dtype=torch.bfloat16)

    @functools.cache
    def find(prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
        with torch.inference_mode():
            logits = (
                model(torch.tensor([prompt + answer]), logits_to_keep=len(answer) + 1)
                .logits[0]
                .float()[:-1]
            )
        return logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]

    return find


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_greedy_tokens_are_the_references_own(
    num_ranks: int,
    prompts: list[list[int]],
    find_gaps: Callable[..., torch.Tensor],
    tmp_path: Path,
) -> None:
    """Each token is the one the whole model takes after the same text, but for bf16 near-ties.

    Given the text so far, so that one near-tie does not hide all that follows.
    """
    if torch.cuda.is_available() and torch.cuda.device_count() < num_ranks:
        pytest.skip(f"{num_ranks} ranks need as many CUDA cards")
    settings = {"low_bit": "bf16", "max_num_batched_tokens": 512, "kv_cache_memory": 2**28}
    job = {"prompts": prompts, "max_tokens": MAX_TOKENS, "settings": settings}
    answers = run_program("arrivals_program", num_ranks, DEMO, job, tmp_path)
    num_tokens = num_near_ties = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        gap = find_gaps(tuple(prompt), tuple(answer))
        assert gap.max() <= BFLOAT16_NOISE, (prompt[-20:], answer, gap.tolist())
        num_tokens += len(answer)
        num_near_ties += int((gap > 0).sum())
    assert num_tokens > NUM_PROMPTS * 10
    assert num_near_ties <= num_tokens // 100, f"{num_near_ties} of {num_tokens} differ"

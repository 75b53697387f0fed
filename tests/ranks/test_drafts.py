"""Speculative decoding with real kernels: tokens, logprobs and ends as without, to the last bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from autotp_serving.kernels.cpu.layer_ops import load_layer_ops
from tests.ranks.launch import ROOT, run_program

DEMO = ROOT / "demo_model"

pytestmark = pytest.mark.ranks


@pytest.mark.skipif(load_layer_ops() is None, reason="without compiled kernels there are none")
@pytest.mark.parametrize(
    ("num_ranks", "low_bit", "as_on_cards"),
    [(1, "bf16", False), (2, "sym_int4", False), (2, "bf16", True)],
)
def test_drafts_change_no_number(
    num_ranks: int, low_bit: str, as_on_cards: bool, tmp_path: Path
) -> None:
    """Greedy and drawn from all, from a top_k and a top_p; small blocks that run out."""
    rng = random.Random(4)
    sample = json.loads((DEMO / "recall_sample.json").read_text())["random"]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2, "logit_bias": {400: 1.0}, "min_tokens": 20},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 0.7, "top_p": 0.9, "min_p": 0.01, "logprobs": 0, "ignore_eos": True},
        {"temperature": 0.7, "frequency_penalty": 0.1},
    ]
    prompts, params = [], []
    for number in range(12):
        entries = rng.sample(sample, 4)
        asked = rng.choice(entries)["question"]
        text = "\n\n".join(f"{one['question']} {one['answer']}" for one in entries)
        prompts.append(f"{text}\n\n{asked}")
        params.append({"max_tokens": 40, "seed": number, **kinds[number % len(kinds)]})
    settings = {"low_bit": low_bit, "max_num_batched_tokens": 256, "max_num_seqs": 6}
    job = {"prompts": prompts, "params": params, "settings": settings, "as_on_cards": as_on_cards}
    plain, drafted, (num_drafts, num_accepted) = run_program(
        "drafts_program", num_ranks, DEMO, job, tmp_path
    )
    assert num_drafts > num_accepted > 50
    for number, (expected, found) in enumerate(zip(plain, drafted, strict=True)):
        assert found == expected, params[number]

"""Speculative decoding with real kernels: tokens, logprobs and ends as without, to the last bit."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from autotp_serving.kernels.cpu.layer_ops import load_layer_ops
from tests.ranks.launch import ROOT, run_program

DEMO = ROOT / "demo_model"

pytestmark = pytest.mark.ranks


@pytest.mark.skipif(load_layer_ops() is None, reason="without compiled kernels there are none")
@pytest.mark.parametrize(
    ("num_ranks", "low_bit", "draft_model", "as_on_cards"),
    [(1, "bf16", "random", False), (2, "sym_int4", "own", False), (2, "bf16", "", True)],
)
def test_drafts_change_no_number(
    num_ranks: int, low_bit: str, draft_model: str, as_on_cards: bool, tmp_path: Path
) -> None:
    """Greedy and drawn from all, from a top_k and a top_p, with penalties and structured output;
    drafts looked up, and of a draft model: the model itself, which is right, or a random one.
    """
    rng = random.Random(4)
    sample = json.loads((DEMO / "recall_sample.json").read_text())["random"]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2, "logit_bias": {400: 1.0}, "min_tokens": 20},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 0.7, "top_p": 0.9, "min_p": 0.01, "logprobs": 0, "ignore_eos": True},
        {"temperature": 0.7, "frequency_penalty": 0.1, "repetition_penalty": 1.1},
        {"temperature": 0.7, "regex": "(A long beginning\\. )[a-z]{1,9}( and then\\.){2,5}"},
    ]
    prompts, params = [], []
    for number in range(14):
        entries = rng.sample(sample, 4)
        asked = rng.choice(entries)["question"]
        text = "\n\n".join(f"{one['question']} {one['answer']}" for one in entries)
        prompts.append(f"{text}\n\n{asked}")
        params.append({"max_tokens": 40, "seed": number, **kinds[number % len(kinds)]})
    settings: dict[str, Any] = {
        "low_bit": low_bit,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 6,
    }
    if draft_model:
        folder = DEMO if draft_model == "own" else save_random(tmp_path / "random")
        settings["draft_model"] = str(folder)
    job = {"prompts": prompts, "params": params, "settings": settings, "as_on_cards": as_on_cards}
    (plain, *_), *ways = run_program("drafts_program", num_ranks, DEMO, job, tmp_path)
    assert len(ways) == 1 + bool(draft_model)
    for found, num_drafts, num_accepted in ways:
        assert num_drafts > num_accepted > 5
        for number, pair in enumerate(zip(plain, found, strict=True)):
            assert pair[0] == pair[1], params[number]
    assert ways[0][2] > 50
    if draft_model:
        share = ways[1][2] / ways[1][1]
        assert share > 0.8 if draft_model == "own" else share < 0.2


def save_random(folder: Path) -> Path:
    """A smaller model with the demo model's tokenizer, and weights that mean nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(DEMO)
    config.update({"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32})
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    return folder

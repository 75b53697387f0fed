"""Checkpoints that others have quantized, at one and two ranks: the tokens of what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.model.checkpoints import save_tiny_llama
from tests.model.families import generate_with_transformers
from tests.model.quantized import LAYOUTS, Layout, Saved, quantize_folder, save_quantized
from tests.ranks.test_families import SETTINGS, make_prompts, run_jobs

pytestmark = pytest.mark.ranks

MAX_TOKENS = 8

ROUNDING = 0.02
"""What a smallest weight in float16 may move logits by, relative to how far they spread."""

# Layouts in other families than Llama: fused layers, experts by name, a tied head.
FAMILY_CASES: dict[str, tuple[str, str]] = {
    "fp8-tensor-static in phi3": ("fp8-tensor-static", "phi3"),
    "fp8-block in qwen3-moe": ("fp8-block", "qwen3-moe"),
    "fp8-block in mixtral": ("fp8-block", "mixtral"),
    "gptq in mixtral": ("gptq", "mixtral"),
    "gptq in phi3": ("gptq-group-64-v2", "phi3"),
    "gptq in qwen2-moe": ("gptq", "qwen2-moe"),
    "awq in qwen3-moe": ("awq", "qwen3-moe"),
    "bnb-nf4 in qwen2": ("bnb-nf4-nested", "qwen2"),
    "ct-w8a8 in gemma2": ("ct-w8a8", "gemma2"),
    "ct-w4a16 in gpt-neox": ("ct-w4a16", "gpt-neox"),
}
# One of each way to pack and to scale; tests/model/test_quantized.py has them all.
LLAMA_CASES = (
    *("fp8-block", "fp8-block-32", "fp8-channel", "modelopt-fp8", "ct-fp8-tensor-static"),
    *("ct-fp8-block", "ct-w8a8", "ct-w4a16", "ct-w4a16-asymmetric", "gptq", "gptq-by-layer"),
    *("gptq-channel-8-bits", "gptq-asymmetric", "gptq-desc-act", "auto-round", "awq"),
    *("bnb-nf4-nested", "bnb-int8"),
)
CASES = {name: (name, "llama") for name in LLAMA_CASES} | FAMILY_CASES


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    root = tmp_path_factory.mktemp("quantized")
    return {
        name: save_quantized(LAYOUTS[layout], family, root / name)
        for name, (layout, family) in CASES.items()
    }


@pytest.fixture(scope="module")
def answers(
    saved: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Any]:
    """Of each checkpoint at one and two ranks, and of the same decoded at start at two."""
    job = {"prompts": make_prompts()[::2], "max_tokens": MAX_TOKENS}
    found = {}
    for num_ranks in (1, 2):
        kinds = [(name, low_bit) for name in saved for low_bit in (None, "bf16")[:num_ranks]]
        jobs = [
            job | {"model": str(saved[name].folder), "settings": SETTINGS | {"low_bit": low_bit}}
            for name, low_bit in kinds
        ]
        results = run_jobs(jobs, num_ranks, tmp_path_factory.mktemp("jobs"))
        found |= {(*kind, num_ranks): one for kind, one in zip(kinds, results, strict=True)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_the_decoded_weights(
    name: str, saved: dict[str, Saved], answers: dict[tuple[str, str | None, int], Any]
) -> None:
    layout: Layout = LAYOUTS[CASES[name][0]]
    prompts = make_prompts()[::2]
    expected = generate_with_transformers(saved[name].reference, prompts, MAX_TOKENS)
    assert len({token for answer in expected for token in answer}) > 6, "answers that prove little"
    assert answers[name, "bf16", 2] == expected
    repacked = answers[name, None, 1]
    assert answers[name, None, 2] == repacked
    if layout.is_lossless and layout.tolerance:
        check_nearest(saved[name].reference, prompts, repacked)
    elif layout.is_lossless:
        assert repacked == expected


def check_nearest(folder: Path, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """Each token is the reference's choice, or its logit is as good as that one's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model.float()(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.amax(1) - chosen <= ROUNDING * logits.std(1)).all()


def test_uneven_ranks_split_groups(tmp_path: Path) -> None:
    """Three ranks share 4 key/value heads of 64 columns: groups of 128 lie on two ranks."""
    model = save_tiny_llama(
        tmp_path / "model", num_hidden_layers=2, head_dim=64, intermediate_size=768
    )
    jobs = []
    for name in ("gptq", "gptq-asymmetric", "fp8-block"):
        quantize_folder(LAYOUTS[name], model, tmp_path / name)
        job = {"model": str(tmp_path / name), "prompts": make_prompts()[:3], "max_tokens": 8}
        jobs.append(job | {"settings": SETTINGS})
    whole, split = (run_jobs(jobs, num_ranks, tmp_path) for num_ranks in (1, 3))
    assert all(isinstance(answer, list) for answer in whole), whole
    assert split == whole

"""Checkpoints that others have quantized, at one and two ranks: the tokens of what they mean."""

from __future__ import annotations

from typing import Any

import pytest

from tests.model.families import generate_with_transformers
from tests.model.quantized import LAYOUTS, Layout, Saved, save_quantized
from tests.ranks.test_families import SETTINGS, make_prompts, run_jobs

pytestmark = pytest.mark.ranks

MAX_TOKENS = 8

# Layouts in other families than Llama: fused layers, experts by name, a tied head.
FAMILY_CASES: dict[str, tuple[str, str]] = {
    "fp8-tensor-static in phi3": ("fp8-tensor-static", "phi3"),
    "fp8-block in qwen3-moe": ("fp8-block", "qwen3-moe"),
    "fp8-block in mixtral": ("fp8-block", "mixtral"),
}
CASES = {name: (name, "llama") for name in LAYOUTS} | FAMILY_CASES


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
    """Of each checkpoint, of the same decoded at start, at one and two ranks."""
    job = {"prompts": make_prompts()[::2], "max_tokens": MAX_TOKENS}
    kinds = [(name, low_bit) for name in saved for low_bit in (None, "bf16")]
    jobs = [
        job | {"model": str(saved[name].folder), "settings": SETTINGS | {"low_bit": low_bit}}
        for name, low_bit in kinds
    ]
    found = {}
    for num_ranks in (1, 2):
        results = run_jobs(jobs, num_ranks, tmp_path_factory.mktemp("jobs"))
        found |= {(*kind, num_ranks): one for kind, one in zip(kinds, results, strict=True)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_the_decoded_weights(
    name: str, saved: dict[str, Saved], answers: dict[tuple[str, str | None, int], Any]
) -> None:
    layout: Layout = LAYOUTS[CASES[name][0]]
    expected = generate_with_transformers(saved[name].reference, make_prompts()[::2], MAX_TOKENS)
    assert len({token for answer in expected for token in answer}) > 6, "answers that prove little"
    for num_ranks in (1, 2):
        assert answers[name, "bf16", num_ranks] == expected
        if layout.is_lossless and not layout.tolerance:
            assert answers[name, None, num_ranks] == expected
    assert answers[name, None, 2] == answers[name, None, 1]

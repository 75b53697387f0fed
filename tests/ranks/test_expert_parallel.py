"""Mixtures whose ranks have whole experts: transformers' tokens, and those of experts in parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.families import generate_with_transformers, save_family
from tests.ranks.test_families import (
    IS_TRANSFORMERS_4,
    MAX_TOKENS,
    SETTINGS,
    make_prompts,
    run_jobs,
)

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(IS_TRANSFORMERS_4, reason="keeps its experts in another way"),
]


def test_whole_experts_on_each_rank(tmp_path: Path) -> None:
    """At three ranks, which four experts do not divide by."""
    prompts = make_prompts()[:4]
    sizes = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3}
    folders = {
        name: save_family(name, tmp_path / name, **sizes)
        for name in ("mixtral", "qwen3-moe", "llama")
    }
    kinds = [
        ("mixtral", {"low_bit": "bf16", "expert_parallel": True}),
        ("qwen3-moe", {"low_bit": "bf16", "expert_parallel": True}),
        ("mixtral", {"low_bit": "sym_int4", "expert_parallel": True}),
        ("mixtral", {"low_bit": "sym_int4"}),
        ("llama", {"low_bit": "bf16", "expert_parallel": True}),
    ]
    jobs = [
        {
            "model": str(folders[name]),
            "prompts": prompts,
            "max_tokens": MAX_TOKENS,
            "settings": SETTINGS | settings,
        }
        for name, settings in kinds
    ]
    *exact, whole, parts, refused = run_jobs(jobs, 3, tmp_path)
    for name, answers in zip(("mixtral", "qwen3-moe"), exact, strict=True):
        assert answers == generate_with_transformers(folders[name], prompts, MAX_TOKENS), name
    assert whole == parts
    assert "--expert-parallel: the family 'llama' has no experts" in refused

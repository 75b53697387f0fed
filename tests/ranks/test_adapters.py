"""LoRA adapters on shards of uneven sizes: the tokens of models that they are merged into."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.adapters import ALL, ATTENTION, merge_adapter, save_adapter
from tests.model.families import generate_with_transformers, save_family
from tests.ranks.launch import run_jobs
from tests.ranks.test_families import SETTINGS, make_prompts

pytestmark = pytest.mark.ranks

MAX_TOKENS = 12
ADAPTERS = {
    "llama": {
        "all": {"targets": ALL, "rank": 8},
        "attention": {"targets": ATTENTION, "rank": 3, "use_rslora": True},
        "mlp": {"targets": ("down_proj", "up_proj"), "rank": 16, "lora_alpha": 5.5},
    },
    "qwen2": {"all": {"targets": ALL, "rank": 4}},
    "phi3": {"fused": {"targets": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), "rank": 4}},
    "gpt-neox": {"fused": {"targets": ("query_key_value", "dense", "dense_4h_to_h"), "rank": 4}},
}
NUM_RANKS = 3
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
"""Of the four key/value heads the ranks have 2, 1 and 1."""


def test_tokens_equal_the_merged_models(tmp_path: Path) -> None:
    jobs, expected = [], []
    for family, adapters in ADAPTERS.items():
        model = save_family(family, tmp_path / family, **HEADS)
        folders = {
            name: save_adapter(model, tmp_path / f"{family}-{name}", **settings)
            for name, settings in adapters.items()
        }
        merged = {None: model} | {
            name: merge_adapter(model, folder, tmp_path / f"{family}-{name}-merged")
            for name, folder in folders.items()
        }
        prompts = make_prompts()
        # Neighbours in a batch have others, or none.
        names = [list(merged)[index % len(merged)] for index in range(len(prompts))]
        answers = {
            index: generate_with_transformers(merged[name], [prompt], MAX_TOKENS)[0]
            for index, (name, prompt) in enumerate(zip(names, prompts, strict=True))
        }
        plain = generate_with_transformers(model, prompts[1:2], MAX_TOKENS)[0]
        assert answers[1] != plain, "an adapter that does nothing proves nothing"
        modules = [f"{name}={folder}" for name, folder in folders.items()]
        jobs.append({
            "model": str(model), "prompts": prompts, "adapters": names, "max_tokens": MAX_TOKENS,
            "settings": SETTINGS | {"low_bit": "bf16", "lora_modules": modules},
        })  # fmt: skip
        expected.append(list(answers.values()))
    assert run_jobs(jobs, NUM_RANKS, tmp_path) == expected

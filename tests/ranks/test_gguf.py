"""GGUF files served: greedy tokens are those of the decoded weights in transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from autotp_serving.devices.build import cache_folder
from tests.model.checkpoints import save_byte_tokenizer
from tests.model.families import COMMON, WINDOW, generate_with_transformers, save_family
from tests.ranks.launch import run_jobs

pytest.importorskip("gguf")
from tests.model.gguf_files import write_gguf

pytestmark = pytest.mark.ranks

NUM_TOKENS = 12
SETTINGS = {
    "low_bit": "bf16",
    "dtype": "float32",
    "max_num_batched_tokens": 32,
    "max_model_len": 256,
    "kv_cache_memory": 2**25,
}
K_SHAPE = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512}


def make_prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 256) for _ in range(length)] for length in (1, 7, 40, 60)]


ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Name: family, type of the matrices, what is changed of the family. 256 columns of an output
# projection are one block of a K-quant, and each of two ranks keeps half of it.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "F16": ("llama", "F16", {}),
    "BF16": ("llama", "BF16", {}),
    "Q8_0": ("llama", "Q8_0", {}),
    "Q4_0": ("llama", "Q4_0", {}),
    "Q4_K": ("llama", "Q4_K", K_SHAPE),
    "Q6_K": ("llama", "Q6_K", K_SHAPE),
    "tied-bias": ("llama-tied-bias", "Q8_0", {}),
    # Its factors lie in the file as a tensor, and are found again as settings.
    "llama3": ("llama", "F32", {"rope_parameters": ROPE, "max_position_embeddings": 131072}),
    "qwen2": ("qwen2", "Q8_0", {}),
    "qwen3": ("qwen3", "Q8_0", {}),
    "gemma2": ("gemma2", "Q8_0", {"query_pre_attn_scalar": 32}),
    "phi3": ("phi3", "Q8_0", {}),
    "mixtral": ("mixtral", "Q8_0", {}),
    "qwen3-moe": ("qwen3-moe", "Q8_0", {"norm_topk_prob": True}),
    "gemma3": ("gemma3", "Q8_0", {}),
}
ONE_RANK_ONLY = ("gemma3",)
"""Families that are served, though not known to be split rightly."""


def save_gemma3(folder: Path) -> Path:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(11)
    changes = {"sliding_window": WINDOW, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}
    changes["num_hidden_layers"] = 7  # the sixth sees all, the others a window
    model = Gemma3ForCausalLM(Gemma3TextConfig(**(COMMON | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(std=0.3)
        model.get_input_embeddings().weight.mul_(0.2)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[list[int]]]:
    """Write the files, and ask transformers."""
    answers = {}
    for name, (family, type_name, changes) in CASES.items():
        source = folder / f"{name}-source"
        if family == "gemma3":
            save_gemma3(source)
        else:
            save_family(family, source, **changes)
        decoded = write_gguf(source, folder / f"{name}.gguf", type_name)
        answers[name] = generate_with_transformers(decoded, make_prompts(), NUM_TOKENS)
    return answers


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_tokens_are_those_of_the_decoded_weights(
    num_ranks: int, folder: Path, expected: dict[str, list[list[int]]]
) -> None:
    names = [name for name in CASES if num_ranks == 1 or name not in ONE_RANK_ONLY]
    jobs = [
        {
            "model": str(folder / f"{name}.gguf"),
            "prompts": make_prompts(),
            "max_tokens": NUM_TOKENS,
            "settings": SETTINGS,
        }
        for name in names
    ]
    # Its folders go into a cache of its own, what is compiled stays in the usual one.
    cache = folder / "cache"
    compiled = cache_folder()
    (cache / "autotp_serving").mkdir(parents=True, exist_ok=True)
    link = cache / "autotp_serving" / compiled.name
    if not link.exists():
        compiled.mkdir(parents=True, exist_ok=True)
        link.symlink_to(compiled)
    answers = run_jobs(jobs, num_ranks, folder, XDG_CACHE_HOME=str(cache))
    found = dict(zip(names, answers, strict=True))
    assert found == {name: expected[name] for name in names}

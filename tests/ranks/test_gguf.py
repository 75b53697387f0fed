"""GGUF files served: greedy tokens are those of the decoded weights in transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.checkpoints import save_byte_tokenizer
from tests.model.families import COMMON, WINDOW, generate_with_transformers, save_family
from tests.ranks.launch import run_program

pytest.importorskip("gguf")
from tests.model.gguf_files import write_gguf  # noqa: E402

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


def serve(path: Path, num_ranks: int, folder: Path, **changes: Any) -> list[list[int]]:
    prompts = make_prompts()
    lens = [NUM_TOKENS] * len(prompts)
    job = {"prompts": prompts, "max_tokens": lens, "settings": SETTINGS | changes}
    return run_program("generate_program", num_ranks, path, job, folder)


def check(model: Path, type_name: str, num_ranks: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    decoded = write_gguf(model, path, type_name)
    expected = generate_with_transformers(decoded, make_prompts(), NUM_TOKENS)
    for count in num_ranks:
        assert serve(path, count, tmp_path) == expected, count


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_each_type(type_name: str, tmp_path: Path) -> None:
    check(save_family("llama", tmp_path / "model"), type_name, (1, 2), tmp_path)


@pytest.mark.parametrize("type_name", ["Q4_K", "Q6_K"])
def test_k_quants_whose_blocks_two_ranks_share(type_name: str, tmp_path: Path) -> None:
    """256 columns of the output projection are one block, and each rank keeps half of it."""
    check(save_family("llama", tmp_path / "model", **K_SHAPE), type_name, (1, 2), tmp_path)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama-tied-bias": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 32},
    "phi3": {},
    "mixtral": {},
    "qwen3-moe": {"norm_topk_prob": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family: str, tmp_path: Path) -> None:
    model = save_family(family, tmp_path / "model", **FAMILIES[family])
    check(model, "Q8_0", (2,), tmp_path)


def test_llama3_with_its_stretched_rotary_embeddings(tmp_path: Path) -> None:
    """They lie in the file as factors, and are found again as settings."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    changes = {"rope_parameters": rope, "max_position_embeddings": 131072}
    check(save_family("llama", tmp_path / "model", **changes), "F32", (1,), tmp_path)


def test_gemma3(tmp_path: Path) -> None:
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
    model.save_pretrained(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    check(tmp_path / "model", "Q8_0", (1,), tmp_path)

"""GGUF files as models: settings, tensors, vocabularies, and files that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autotp_serving.config import ServingConfig
from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.engine.tokenizer import HuggingFaceTokenizer
from autotp_serving.model.gguf.checkpoint import GgufCheckpoint
from autotp_serving.model.gguf.folder import convert_metadata
from autotp_serving.model.gguf.header import TYPES
from autotp_serving.model.source import resolve_model
from tests.model.families import save_family

gguf = pytest.importorskip("gguf")
from tests.model.gguf_files import read_state, write_gguf  # noqa: E402

ROOT = Path(__file__).parents[2]
TYPE_NAMES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_NAMES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
K_SHAPE = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def resolve(path: Path, **settings: Any) -> ServingConfig:
    return resolve_model(ServingConfig(model_path=str(path), **settings), LocalRankGroup())


def test_block_sizes_are_the_packages_own() -> None:
    for number, one in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (one.name, one.block, one.num_bytes)


@pytest.mark.parametrize("type_name", [*TYPE_NAMES, *K_NAMES])
def test_any_slice_is_what_the_package_decodes(type_name: str, tmp_path: Path) -> None:
    """Rows and columns that no block and no head begins at, too."""
    changes = K_SHAPE if type_name in K_NAMES else {}
    decoded = read_state(
        write_gguf(
            save_family("llama", tmp_path / "model", **changes), tmp_path / "m.gguf", type_name
        )
    )
    checkpoint = GgufCheckpoint(convert_metadata([tmp_path / "m.gguf"]), torch.float32)
    assert checkpoint.names() == set(decoded)
    for name, whole in decoded.items():
        assert checkpoint.shape(name) == whole.shape
        sizes = whole.shape
        for ranges in (
            tuple((0, size) for size in sizes),
            tuple((size // 3, size - 5) for size in sizes),
            tuple((size // 2, size) for size in sizes),
        ):
            expected = whole[tuple(slice(*one) for one in ranges)]
            assert torch.equal(checkpoint.read(name, ranges), expected), (name, ranges)


def test_numbers_come_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    decoded = read_state(
        write_gguf(save_family("qwen2", tmp_path / "m"), tmp_path / "m.gguf", "Q8_0")
    )
    checkpoint = GgufCheckpoint(convert_metadata([tmp_path / "m.gguf"]), torch.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    found = checkpoint.read(name, ((0, 8), (0, 256)))
    assert checkpoint.itemsize(name) == 2 and torch.equal(found, decoded[name][:8].bfloat16())


FAMILY_NAMES = (
    *("llama", "llama-tied-bias", "llama-rope-linear", "qwen2", "qwen3", "gemma2", "phi3"),
    *("mixtral", "qwen3-moe"),
)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_settings_are_those_of_the_original(family: str, tmp_path: Path) -> None:
    import transformers

    # As llama.cpp runs every model of this family.
    changes = {"norm_topk_prob": True} if family == "qwen3-moe" else {}
    model = save_family(family, tmp_path / "model", **changes)
    write_gguf(model, tmp_path / "m.gguf", "F16")
    folder = Path(resolve(tmp_path / "m.gguf").model_path)
    found = transformers.AutoConfig.from_pretrained(folder)
    original = transformers.AutoConfig.from_pretrained(model)
    known = set(
        json.loads((Path(resolve(tmp_path / "m.gguf").model_path) / "config.json").read_text())
    )
    skipped = {"architectures", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
    skipped |= {"sliding_window"} if family == "mixtral" else set()
    # What a Gemma 2 of this size would have; the made-up one has another.
    skipped |= {"query_pre_attn_scalar"} if family == "gemma2" else set()
    for name in (known | {"rope_parameters"}) - skipped - {"rope_theta", "rope_scaling"}:
        if hasattr(original, name):
            assert getattr(found, name) == getattr(original, name), name


def test_the_demo_models_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    write_gguf(ROOT / "demo_model", tmp_path / "m.gguf", "F16")
    folder = Path(resolve(tmp_path / "m.gguf").model_path)
    found = HuggingFaceTokenizer(folder)
    original = HuggingFaceTokenizer(ROOT / "demo_model")
    lines = (ROOT / "docs" / "api.md").read_text().splitlines()
    lines += [
        "What is AI?",
        "<|user|>hi<|end|>",
        "  two  blanks ",
        "äöü 漢字 🙂",
        "12345",
        "a\n\nb\t",
    ]
    for line in lines:
        assert found.encode(line) == original.encode(line), line
    assert found.chat_template == original.chat_template
    assert found.eos_token_ids == original.eos_token_ids
    assert found.special_token_ids == original.special_token_ids

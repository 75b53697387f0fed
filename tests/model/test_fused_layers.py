"""The quicker pass beside transformers' own: as near to float32 as that is, for every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autotp_serving.config import ServingConfig
from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.model.forward import PlainForward
from autotp_serving.model.fused_layers import FusedForward, fuse, join_linears
from autotp_serving.model.kv_cache import KVCache, KVCacheShape
from autotp_serving.model.loader import load_model, read_model_config
from autotp_serving.model.step_inputs import StepInputs
from autotp_serving.worker.backend import choose_backend
from tests.compiler import needs_compiler
from tests.model.families import COMMON, save_family
from tests.model.steps import make_inputs

CPU = torch.device("cpu")
BLOCK_SIZE = 16
FUSED = (
    "llama",
    "llama-tied-bias",
    "llama-rope-llama3",
    "llama-rope-dynamic",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "phi3",
)
# Of two sequences: (tokens before, tokens to run) each. A prompt at once and one in pieces, a
# prompt beside a decode, decodes alone, one sequence alone.
STEPS = (((0, 40), (0, 7)), ((40, 1), (7, 30)), ((41, 1), (37, 1)), ((42, 20), (38, 1)))

pytestmark = needs_compiler


def make_step(parts: tuple[tuple[int, int], ...]) -> StepInputs:
    """Its logits are those of every token."""
    tables = [list(range(8)), list(range(8, 16))][: len(parts)]
    token_ids = [
        (position * 37 + number * 11) % 256
        for number, (start, length) in enumerate(parts)
        for position in range(start, start + length)
    ]
    starts, lens = (list(column) for column in zip(*parts, strict=True))
    inputs = make_inputs(tables, starts, lens, BLOCK_SIZE, token_ids)
    return replace(inputs, logit_rows=torch.arange(inputs.num_tokens))


def load(
    folder: Path, low_bit: str, dtype: str, is_int8: bool = False
) -> tuple[torch.nn.Module, KVCache]:
    config = ServingConfig(model_path=str(folder), low_bit=low_bit, dtype=dtype)
    model_config = read_model_config(config)
    model = load_model(config, model_config, LocalRankGroup(), CPU, lambda tensor: tensor)
    heads = (COMMON["num_key_value_heads"], model_config.head_dim, model_config.head_dim)
    shape = KVCacheShape((heads,) * COMMON["num_hidden_layers"], BLOCK_SIZE, model.dtype, is_int8)
    return model, KVCache(shape, 16, CPU, choose_backend(CPU).cache(shape))


@torch.inference_mode()
def run(forward: object) -> list[Tensor]:
    return [forward(make_step(parts)).double() for parts in STEPS]


def find_error(logits: Tensor, reference: Tensor) -> float:
    return float((logits - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    ("family", "low_bit"),
    [(family, "bf16") for family in FUSED] + [("llama-tied-bias", "sym_int8"), ("qwen3", "nf4")],
)
def test_as_near_to_float32_as_transformers(tmp_path: Path, family: str, low_bit: str) -> None:
    folder = save_family(family, tmp_path)
    model, cache = load(folder, low_bit, "bfloat16")
    forward = fuse(model, cache)
    assert isinstance(forward, FusedForward)
    fused, plain = run(forward), run(PlainForward(model, cache))
    reference = run(PlainForward(*load(folder, low_bit, "float32")))
    for ours, theirs, exact in zip(fused, plain, reference, strict=True):
        assert ours.shape == exact.shape
        assert find_error(ours, exact) < 1.3 * find_error(theirs, exact)
        assert find_error(theirs, exact) < 0.3


def test_with_an_int8_cache_as_near_to_float32_as_transformers_code(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path)
    model, cache = load(folder, "bf16", "bfloat16", is_int8=True)
    fused, plain = run(fuse(model, cache)), run(PlainForward(model, cache))
    reference = run(PlainForward(*load(folder, "bf16", "float32")))
    for ours, theirs, exact in zip(fused, plain, reference, strict=True):
        assert find_error(ours, exact) < 1.3 * find_error(theirs, exact)
        assert find_error(theirs, exact) < 0.3


@pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [
        ("gemma2", "bfloat16", {}),  # other layers
        ("llama", "float32", {}),  # a cache that the attention kernel does not read
        ("llama", "bfloat16", {"hidden_act": "gelu"}),
        ("llama", "bfloat16", {"intermediate_size": 248}),  # the vectors do not divide it
        ("phi3", "bfloat16", {"partial_rotary_factor": 0.5}),
    ],
)
def test_what_is_not_for_it_is_left_to_transformers(
    tmp_path: Path, family: str, dtype: str, changes: dict[str, object]
) -> None:
    folder = save_family(family, tmp_path, **changes)
    assert fuse(*load(folder, "bf16", dtype)) is None


@pytest.mark.parametrize(
    ("family", "is_int8"),
    [("llama-tied-bias", False), ("mistral", False), ("qwen3", False), ("qwen3", True)],
)
def test_native_layers_are_the_operations_one_by_one(
    tmp_path: Path, family: str, is_int8: bool
) -> None:
    model, cache = load(save_family(family, tmp_path), "sym_int4", "bfloat16", is_int8)
    native_layers, operations = fuse(model, cache), fuse(model, cache, by_operation=True)
    assert native_layers._native_layers is not None and operations._native_layers is None
    for ours, expected in zip(run(native_layers), run(operations), strict=True):
        assert torch.equal(ours, expected)


def test_linears_of_unlike_formats_are_still_joined(tmp_path: Path) -> None:
    """--modules-to-not-convert may leave some of the siblings dense."""
    folder = save_family("llama", tmp_path)
    model, _ = load(folder, "sym_int4", "bfloat16")
    attention = model.model.layers[0].self_attn
    rows, cols = attention.q_proj.weight.shape
    dense = torch.nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16)
    x = torch.randn(5, cols).bfloat16()
    joined = join_linears(dense, attention.k_proj)(x)
    assert torch.equal(joined, torch.cat([dense(x), attention.k_proj(x)], 1))

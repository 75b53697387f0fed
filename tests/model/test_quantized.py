"""Checkpoints that others have quantized: each slice is the weight that its producer means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from autotp_serving.config import ServingConfig
from autotp_serving.devices import open_device
from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.layers.low_bit_linear import LowBitLinear
from autotp_serving.low_bit.tensor import dequantize
from autotp_serving.memory.planner import print_plan
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.loader import load_model, read_model_config
from autotp_serving.model.save import save_low_bit
from tests.model.quantized import LAYOUTS, Layout, Saved, save_quantized

SLICES = [
    ((0, None), (0, None)),
    ((7, 50), (0, None)),
    ((0, None), (64, 128)),
    ((31, 33), (64, None)),
]


@pytest.fixture(scope="module", params=LAYOUTS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Layout, Saved]:
    layout = LAYOUTS[request.param]
    return layout, save_quantized(layout, "llama", tmp_path_factory.mktemp("quantized"))


def cut(shape: tuple[int, ...], part: tuple) -> tuple[tuple[int, int], ...]:
    return tuple((start, stop or size) for (start, stop), size in zip(part, shape, strict=True))


@pytest.mark.parametrize("part", SLICES)
def test_slices_are_what_the_producer_means(case: tuple[Layout, Saved], part: tuple) -> None:
    layout, saved = case
    checkpoint = Checkpoint(saved.folder)
    for name, meant in saved.meant.items():
        ranges = cut(meant.shape, part)
        expected = meant[slice(*ranges[0]), slice(*ranges[1])]
        assert checkpoint.low_bit_format(name).name == layout.find_format(name)
        weight = checkpoint.read_low_bit(name, ranges)
        error = (dequantize(weight) - expected).abs().max()
        assert error <= layout.tolerance * meant.abs().max(), name
    is_told = checkpoint.describe_loss() is not None
    assert is_told is not layout.is_lossless


def test_kernels_multiply_by_it(case: tuple[Layout, Saved]) -> None:
    """Codes and scales that no quantizer of ours makes, such as -128 and scales repeated."""
    _, saved = case
    checkpoint = Checkpoint(saved.folder)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    for name, meant in saved.meant.items():
        if meant.shape[1] != x.shape[1]:
            continue
        weight = checkpoint.read_low_bit(name, tuple((0, size) for size in meant.shape))
        expected = x.float() @ dequantize(weight).T
        error = (LowBitLinear(weight)(x).float() - expected).norm() / expected.norm()
        assert error < 0.03, name


@pytest.mark.parametrize("part", [*SLICES, ((3, 60), (5, 77)), ((0, 1), (127, 128))])
def test_decoded_slices_are_exact(case: tuple[Layout, Saved], part: tuple) -> None:
    _, saved = case
    config = ServingConfig(model_path=str(saved.folder), low_bit="bf16", dtype="float32")
    checkpoint = Checkpoint(saved.folder, config)
    for name, meant in saved.meant.items():
        ranges = cut(meant.shape, part)
        expected = meant[slice(*ranges[0]), slice(*ranges[1])]
        assert checkpoint.low_bit_format(name) is None
        assert torch.equal(checkpoint.read(name, ranges), expected), name


def test_the_parts_are_hidden(case: tuple[Layout, Saved]) -> None:
    _, saved = case
    names = {name for name in Checkpoint(saved.folder).names() if not name.endswith(".bias")}
    assert names == Checkpoint(saved.reference).names()


def load(folder: Path, **settings: Any) -> torch.nn.Module:
    config = ServingConfig(model_path=str(folder), device="cpu", **settings)
    device = open_device("cpu", 0).torch_device
    return load_model(config, read_model_config(config), LocalRankGroup(), device, lambda x: x)


def save(source: Path, target: Path, **settings: Any) -> None:
    config = ServingConfig(model_path=str(source), save_low_bit=str(target), **settings)
    save_low_bit(config, read_model_config(config), LocalRankGroup())


@pytest.mark.parametrize("low_bit", [None, "sym_int5"])
def test_saved_low_bit_it_reloads_byte_for_byte(
    low_bit: str | None, case: tuple[Layout, Saved], tmp_path: Path
) -> None:
    _, saved = case
    save(saved.folder, tmp_path / "saved", low_bit=low_bit)
    loaded = load(saved.folder, low_bit=low_bit).state_dict()
    reloaded = load(tmp_path / "saved").state_dict()
    assert set(loaded) == set(reloaded)
    for name, value in loaded.items():
        assert torch.equal(value, reloaded[name]), name


def test_the_plan_counts_the_formats_that_it_becomes(
    case: tuple[Layout, Saved], capsys: pytest.CaptureFixture[str]
) -> None:
    layout, saved = case
    config = ServingConfig(model_path=str(saved.folder), plan=True, device="cpu")
    print_plan(config, 1, 1)
    assert layout.becomes in capsys.readouterr().out


def test_what_the_producer_left_alone_stays_in_16_bits(case: tuple[Layout, Saved]) -> None:
    """Whatever --low-bit says; the head is asked for by its own flag."""
    _, saved = case
    model = load(saved.folder, low_bit="sym_int4")
    assert model.lm_head.low_bit is None
    assert model.model.layers[0].mlp.up_proj.weight.format.name == "sym_int4"
    model = load(saved.folder, lm_head_low_bit="sym_int8", modules_to_not_convert=("up_proj",))
    assert model.lm_head.low_bit.weight.format.name == "sym_int8"
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16

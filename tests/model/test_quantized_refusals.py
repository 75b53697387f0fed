"""Quantized checkpoints that are damaged, or of a kind that is not read: one line, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from autotp_serving.config import ConfigError
from autotp_serving.low_bit.formats import LowBitError
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.stored_tensors import SINGLE_NAME
from tests.model.quantized import LAYOUTS

ROWS, COLS = 64, 256


def write(folder: Path, layout: str, change: Callable[[dict[str, Tensor]], Any], **settings: Any):
    """One layer in a layout, changed."""
    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(5))
    tensors, _ = LAYOUTS[layout].write(weight)
    change(tensors)
    save_file(
        {f"layer.{name}": value.contiguous() for name, value in tensors.items()},
        folder / SINGLE_NAME,
    )
    config = {"quantization_config": LAYOUTS[layout].settings | settings}
    (folder / "config.json").write_text(json.dumps(config))


def nothing(tensors: dict[str, Tensor]) -> None:
    """Leave all as it is."""


# The layout, the tensor that is missing or has lost a row, and what the line tells.
DAMAGED = [
    ("fp8-block", "weight_scale_inv", "without a scale"),
    ("gptq", "scales", "no scales"),
    ("gptq", "qzeros", "no qzeros"),
    ("awq", "scales", "layer.scales is missing"),
    ("awq", "qzeros", "layer.qzeros is missing"),
    ("ct-w4a16", "weight_scale", "weight_scale"),
    ("ct-w8a8", "weight_scale", "without a weight_scale"),
    ("bnb-nf4-nested", "weight.absmax", "absmax is missing"),
    ("bnb-nf4-nested", "weight.nested_absmax", "nested_absmax is missing"),
    ("bnb-int8", "weight", "no int8 weight"),
]


@pytest.mark.parametrize(("layout", "name", "words"), DAMAGED)
def test_a_part_that_is_missing(layout: str, name: str, words: str, tmp_path: Path) -> None:
    write(tmp_path, layout, lambda tensors: tensors.pop(name))
    with pytest.raises(ConfigError, match=words) as failure:
        Checkpoint(tmp_path)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("fp8-block", "weight_scale_inv"),
        ("fp8-channel", "weight_scale"),
        ("gptq", "scales"),
        ("gptq", "qzeros"),
        ("gptq", "g_idx"),
        ("awq", "scales"),
        ("awq", "qzeros"),
        ("ct-w4a16", "weight_scale"),
        ("ct-w4a16", "weight_shape"),
        ("ct-w4a16-asymmetric", "weight_zero_point"),
        ("ct-w8a8", "weight_scale"),
        ("bnb-nf4-nested", "weight.absmax"),
        ("bnb-nf4-nested", "weight.quant_map"),
        ("bnb-int8", "SCB"),
    ],
)
def test_a_part_of_another_size(layout: str, name: str, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.cat([tensors[name]] * 3)

    write(tmp_path, layout, enlarge)
    with pytest.raises(ConfigError, match=r"layer"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("layout", "settings", "words"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq", {"group_size": 96}, "group_size"),
        ("gptq", {"group_size": "x", "bits": [4], "dynamic": {"+:a": {"bits": "y"}}}, "group_size"),
        ("auto-round", {"packing_format": "auto_round:llm_compressor"}, "llm_compressor"),
        ("auto-round", {"packing_format": None}, "None"),
        ("awq", {"version": "gemv"}, "gemv"),
        ("awq", {"bits": 3}, "3"),
        ("awq", {"group_size": 0}, "group_size"),
        ("fp8-block", {"weight_block_size": [0, 128]}, "weight_block_size"),
        ("fp8-block", {"weight_block_size": [64, 64]}, "fits no way"),
        ("ct-w4a16", {"format": "nvfp4-pack-quantized"}, "nvfp4"),
        ("ct-w4a16", {"config_groups": []}, "fit no scheme"),
        ("ct-w4a16", {"config_groups": [3]}, "no object"),
        ("ct-w4a16", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ("ct-w4a16", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ("bnb-nf4-nested", {"quant_method": "quanto"}, "quanto"),
        ("modelopt-fp8", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    ],
)
def test_settings_that_are_not_read(
    layout: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    write(tmp_path, layout, nothing, **settings)
    with pytest.raises(ConfigError, match=words) as failure:
        Checkpoint(tmp_path)
    assert "\n" not in str(failure.value)


def set_first(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    """A change of one number."""

    def change(tensors: dict[str, Tensor]) -> None:
        changed = tensors[name].contiguous().clone()
        changed.view(-1)[0] = value
        tensors[name] = changed

    return change


@pytest.mark.parametrize(
    ("layout", "name", "value", "words"),
    [
        ("fp8-block", "weight", float("nan"), "NaN"),
        ("fp8-block", "weight_scale_inv", float("inf"), "infinity"),
        ("gptq", "scales", float("nan"), "no numbers"),
        ("gptq", "qzeros", 0, "not in the middle"),
        ("gptq", "g_idx", 1, "other groups"),
        ("ct-w4a16", "weight_shape", 65, "weight_shape"),
        ("ct-w8a8", "weight_scale", float("inf"), "no numbers"),
        ("bnb-nf4-block-128", "weight.absmax", 1e9, "too large"),
        ("bnb-nf4-nested", "weight.quant_map", -0.5, "other levels"),
        ("bnb-int8", "weight_format", 2, "row by row"),
        ("gptq-desc-act", "g_idx", 99, "a group that there is not"),
    ],
)
def test_numbers_that_cannot_be(
    layout: str, name: str, value: float, words: str, tmp_path: Path
) -> None:
    write(tmp_path, layout, set_first(name, value))
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(LowBitError, match=words):
        checkpoint.read_low_bit("layer.weight", ((0, ROWS), (0, COLS)))


def test_a_slice_inside_a_block(tmp_path: Path) -> None:
    write(tmp_path, "gptq", nothing)
    with pytest.raises(LowBitError, match="split a block of 64"):
        Checkpoint(tmp_path).read_low_bit("layer.weight", ((0, ROWS), (0, 96)))


def test_a_description_of_four_bits_that_is_no_json(tmp_path: Path) -> None:
    name = "weight.quant_state.bitsandbytes__nf4"
    write(
        tmp_path,
        "bnb-nf4-nested",
        lambda tensors: tensors.update({name: torch.full((90,), 91, dtype=torch.uint8)}),
    )
    with pytest.raises(ConfigError, match="cannot be read"):
        Checkpoint(tmp_path)


def test_a_head_and_a_router_that_are_quantized(tmp_path: Path) -> None:
    """The head stays as it is, the router is decoded: few weights, and they decide alone."""
    layout = replace(LAYOUTS["gptq"], dense=())
    weight = torch.randn(ROWS, COLS)
    tensors = {}
    for module in ("lm_head", "model.layers.0.mlp.gate"):
        tensors |= {f"{module}.{last}": value for last, value in layout.write(weight)[0].items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / SINGLE_NAME)
    config = {"quantization_config": layout.settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.low_bit_format("lm_head.weight").name == "sym_int4"
    assert checkpoint.low_bit_format("model.layers.0.mlp.gate.weight") is None

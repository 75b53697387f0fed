"""Stacked experts in MXFP4: each slice is what the format means, and damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.low_bit.formats import LowBitError
from autotp_serving.low_bit.tensor import dequantize
from autotp_serving.memory.planner import print_plan
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.quantized.mxfp4 import Mxfp4Weight
from autotp_serving.model.stored_tensors import SINGLE_NAME
from tests.model.gpt_oss import Saved, save_mxfp4
from tests.model.test_quantized import cut, load, save
from tests.ranks.test_families import IS_TRANSFORMERS_4

pytestmark = pytest.mark.skipif(IS_TRANSFORMERS_4, reason="has no gpt-oss")

SLICES = [
    ((0, None), (0, None)),
    ((7, 50), (0, None)),
    ((0, None), (64, 128)),
    ((31, 33), (64, None)),
]
EXPERTS = "model.layers.2.mlp.experts"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_mxfp4(tmp_path_factory.mktemp("mxfp4"))


def list_meant(saved: Saved) -> dict[str, torch.Tensor]:
    """The matrices of a few experts, by their names here."""
    gate_up, down = (saved.meant[f"{EXPERTS}.{name}"] for name in ("gate_up_proj", "down_proj"))
    return {
        f"{EXPERTS}.{number}.{part}.weight": matrix
        for number in (0, 4)
        for part, matrix in (
            ("gate_proj", gate_up[number, 0::2]),
            ("up_proj", gate_up[number, 1::2]),
            ("down_proj", down[number]),
        )
    }


@pytest.mark.parametrize("part", SLICES)
def test_slices_are_exact_in_fp6(saved: Saved, part: tuple) -> None:
    checkpoint = Checkpoint(saved.folder)
    for name, meant in list_meant(saved).items():
        ranges = cut(meant.shape, part)
        weight = checkpoint.read_low_bit(name, ranges)
        assert weight.format.name == "fp6"
        assert torch.equal(dequantize(weight), meant[slice(*ranges[0]), slice(*ranges[1])]), name
    assert "without loss" in checkpoint.describe_loss()


@pytest.mark.parametrize("part", [*SLICES, ((3, 60), (5, 77)), ((0, 1), (127, 128))])
def test_decoded_slices_are_exact(saved: Saved, part: tuple) -> None:
    config = ServingConfig(model_path=str(saved.folder), low_bit="bf16", dtype="float32")
    checkpoint = Checkpoint(saved.folder, config)
    for name, meant in list_meant(saved).items():
        ranges = cut(meant.shape, part)
        expected = meant[slice(*ranges[0]), slice(*ranges[1])]
        assert checkpoint.low_bit_format(name) is None
        assert torch.equal(checkpoint.read(name, ranges), expected), name


@pytest.mark.parametrize(("low_bit", "least", "most"), [("fp4", 0.005, 0.04), ("nf4", 0.05, 0.1)])
def test_other_formats_tell_their_loss(
    saved: Saved, low_bit: str, least: float, most: float
) -> None:
    """fp4 is of the same size; its scales, powers of two as well, cost it half of nf4's loss."""
    config = ServingConfig(model_path=str(saved.folder), low_bit=low_bit)
    checkpoint = Checkpoint(saved.folder, config)
    for name, meant in list_meant(saved).items():
        weight = checkpoint.read_low_bit(name, cut(meant.shape, SLICES[0]))
        error = (dequantize(weight) - meant).norm() / meant.norm()
        assert least < error < most
    assert least < checkpoint._loss.relative < most


def decode_block(codes: list[int], scales: list[int]) -> tuple[Mxfp4Weight, Callable]:
    """One row of groups, each with one code first and zeros after it."""
    blocks = torch.zeros(1, 1, len(codes), 16, dtype=torch.uint8)
    blocks[0, 0, :, 0] = torch.tensor(codes)
    stored = {"x_blocks": blocks, "x_scales": torch.tensor([[scales]], dtype=torch.uint8)}
    return Mxfp4Weight("x", 0, 0, 1, (1, 32 * len(codes))), lambda name, ranges: stored[name]


@pytest.mark.parametrize(
    ("code", "scale", "number"),
    [
        (1, 127, 0.5),
        (7, 127, 6.0),
        (15, 120, -6 / 128),
        (9, 0, -0.5 * 2.0**-127),
        (5, 254, 3 * 2.0**127),
    ],
)
def test_codes_and_scales(code: int, scale: int, number: float) -> None:
    weight, read = decode_block([code], [scale])
    if abs(number) < 2.0**128:
        assert weight.decode(read, (0, 1), (0, 32))[0, 0].item() == number
    else:
        with pytest.raises(LowBitError, match="too large"):
            weight.decode(read, (0, 1), (0, 32))


def test_a_scale_that_is_no_number() -> None:
    weight, read = decode_block([1], [255])
    with pytest.raises(LowBitError, match="NaN"):
        weight.decode(read, (0, 1), (0, 32))


def test_saved_low_bit_it_reloads_byte_for_byte(saved: Saved, tmp_path: Path) -> None:
    save(saved.folder, tmp_path / "saved")
    loaded, reloaded = load(saved.folder).state_dict(), load(tmp_path / "saved").state_dict()
    assert set(loaded) == set(reloaded)
    for name, value in loaded.items():
        assert torch.equal(value, reloaded[name]), name


def test_the_plan_counts_fp6(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(ServingConfig(model_path=str(saved.folder), plan=True, device="cpu"), 1, 1)
    assert "fp6" in capsys.readouterr().out


def change_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / SINGLE_NAME)
        edit(tensors)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})

    return change


def replace(last: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERTS}.{last}"] = edit(tensors[f"{EXPERTS}.{last}"])

    return change_tensors(change)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "another family": (change_config(model_type="mixtral"), "alone, not for 'mixtral'"),
    "no scales": (
        change_tensors(lambda tensors: tensors.pop(f"{EXPERTS}.down_proj_scales")),
        "with its _scales beside it",
    ),
    "no blocks": (
        change_tensors(lambda tensors: tensors.pop(f"{EXPERTS}.down_proj_blocks")),
        "no tensor model.layers.2.mlp.experts.0.down_proj.weight",
    ),
    "too few scales": (
        replace("down_proj_scales", lambda scales: scales[:, :, :-1]),
        "does not fit its scales",
    ),
    "another type": (replace("down_proj_blocks", lambda blocks: blocks.int()), "I32"),
    "an odd number of rows": (
        change_tensors(
            lambda tensors: tensors.update(
                {
                    name: tensor[:, :-1]
                    for name, tensor in tensors.items()
                    if name.startswith(f"{EXPERTS}.gate_up_proj_") and tensor.dim() > 2
                }
            )
        ),
        "none of 2 matrices",
    ),
    "one expert less": (
        change_tensors(
            lambda tensors: tensors.update(
                {
                    name: tensor[:-1]
                    for name, tensor in tensors.items()
                    if name.startswith(f"{EXPERTS}.")
                }
            )
        ),
        r"down_proj_bias has shape \(4, 160\)",
    ),
    "a scale that is no number": (
        replace("gate_up_proj_scales", lambda scales: torch.full_like(scales, 255)),
        "_scales holds NaN",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, saved: Saved, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    folder = shutil.copytree(saved.folder, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_settings_without_such_tensors(saved: Saved, tmp_path: Path) -> None:
    """Weights that --low-bit would pass over, for they count as quantized by others."""
    folder = shutil.copytree(saved.reference, tmp_path / "plain")
    change_config(quantization_config={"quant_method": "mxfp4"})(folder)
    with pytest.raises(ConfigError, match="no tensor's name ends in _blocks"):
        Checkpoint(folder)

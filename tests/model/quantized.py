"""Writes tiny random checkpoints in the layouts of other people's quantizers.

Each writer turns a weight [rows, cols] into the tensors that its producer stores for it, and
returns beside them the weight that they mean, computed by the producer's own rule and not by code
of ours.
`save_quantized` does so for all linear layers of a model, and saves what they mean, too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autotp_serving.model.stored_tensors import SINGLE_NAME
from tests.model.families import save_family

Written = tuple[dict[str, Tensor], Tensor]
"""Tensors by the last part of their names, and the weight [rows, cols] that they mean, float32."""


@dataclass(frozen=True)
class Layout:
    """One producer's way.

    Attributes:
        write: makes the tensors of one layer.
        settings: what config.json says, or the file `side_file` beside it.
        becomes: the format that takes the weights, or None where they are decoded.
        tolerance: largest error of a repacked weight, relative to the largest one.
        dense: parts of names that the producer leaves alone.
    """

    write: Callable[[Tensor], Written]
    settings: dict[str, Any]
    becomes: str
    is_lossless: bool = True
    tolerance: float = 0.0
    side_file: str | None = None
    dense: tuple[str, ...] = (
        "lm_head",
        "embed",
        "norm",
        "mlp.gate.",
        "shared_expert_gate",
        "embed_out",
    )
    extra: dict[str, Tensor] = field(default_factory=dict)


def fp8_round(values: Tensor) -> Tensor:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def write_block_fp8(
    weight: Tensor, block: int = 128, scale_dtype: torch.dtype = torch.float32
) -> Written:
    """DeepSeek's: a scale for each block of rows and columns, named after its inverse."""
    rows, cols = weight.shape
    scales = torch.empty(-(-rows // block), -(-cols // block))
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    meant = torch.empty(rows, cols)
    for row in range(scales.shape[0]):
        for col in range(scales.shape[1]):
            part = (slice(row * block, (row + 1) * block), slice(col * block, (col + 1) * block))
            scale = weight[part].abs().max() / 448
            if scale_dtype == torch.float8_e8m0fnu:
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            scale = scale.to(scale_dtype).float()
            scales[row, col] = scale
            codes[part] = fp8_round(weight[part] / scale)
            meant[part] = codes[part].float() * scale
    return {"weight": codes, "weight_scale_inv": scales.to(scale_dtype)}, meant


def write_scaled_fp8(
    weight: Tensor,
    per_channel: bool,
    scale_dtype: torch.dtype = torch.float32,
    is_static: bool = False,
    shape: tuple[int, ...] | None = None,
) -> Written:
    """A scale for the tensor, or one for each row."""
    peak = weight.abs().amax(1, keepdim=True) if per_channel else weight.abs().max().view(1, 1)
    scale = (peak / 448).to(scale_dtype)
    codes = fp8_round(weight / scale.float())
    meant = codes.float() * scale.float()
    if shape is not None:
        scale = scale.view(shape)
    tensors = {"weight": codes, "weight_scale": scale}
    if is_static:
        tensors["input_scale"] = torch.tensor(0.02)
    return tensors, meant


def write_e5m2(weight: Tensor) -> Written:
    scale = weight.abs().max() / 57344
    codes = (weight / scale).to(torch.float8_e5m2)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


BLOCK_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}

LAYOUTS: dict[str, Layout] = {
    "fp8-block": Layout(write_block_fp8, BLOCK_FP8 | {"fmt": "e4m3"}, "fp8_e4m3"),
    "fp8-block-bf16-scales": Layout(
        lambda weight: write_block_fp8(weight, scale_dtype=torch.bfloat16), BLOCK_FP8, "fp8_e4m3"
    ),
    "fp8-block-ue8m0": Layout(
        lambda weight: write_block_fp8(weight, scale_dtype=torch.float8_e8m0fnu),
        BLOCK_FP8 | {"scale_fmt": "ue8m0"},
        "fp8_e4m3",
    ),
    "fp8-block-32": Layout(
        lambda weight: write_block_fp8(weight, 32),
        BLOCK_FP8 | {"weight_block_size": [32, 32]},
        "fp8_e4m3",
        is_lossless=False,
        tolerance=0.04,
    ),
    "fp8-tensor-static": Layout(
        lambda weight: write_scaled_fp8(weight, False, is_static=True, shape=()),
        {"quant_method": "fp8", "activation_scheme": "static"},
        "fp8_e4m3",
    ),
    "fp8-channel": Layout(
        lambda weight: write_scaled_fp8(weight, True), {"quant_method": "fbgemm_fp8"}, "fp8_e4m3"
    ),
    "fp8-e5m2": Layout(
        write_e5m2, {"quant_method": "fp8"}, "fp8_e4m3", is_lossless=False, tolerance=0.04
    ),
}


@dataclass(frozen=True)
class Saved:
    """Attributes: folder: the checkpoint; reference: the same decoded; meant: weights by name."""

    folder: Path
    reference: Path
    meant: dict[str, Tensor]


def save_quantized(layout: Layout, family: str, root: Path, **changes: Any) -> Saved:
    """Save a random model of a family quantized, and beside it the float32 model that it means."""
    folder, reference = root / "quantized", save_family(family, root / "reference", **changes)
    tensors: dict[str, Tensor] = {}
    for path in reference.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (reference / "model.safetensors.index.json").unlink(missing_ok=True)
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        is_dense = tensor.dim() != 2 or any(part in name for part in layout.dense)
        if is_dense or not name.endswith(".weight"):
            stored[name] = tensor
            continue
        parts, meant[name] = layout.write(tensor)
        stored |= {f"{name.removesuffix('.weight')}.{last}": part for last, part in parts.items()}
    shutil.copytree(reference, folder)
    stored = {name: value.contiguous() for name, value in (stored | layout.extra).items()}
    save_file(tensors | meant, reference / SINGLE_NAME, metadata={"format": "pt"})
    save_file(stored, folder / SINGLE_NAME, metadata={"format": "pt"})
    if layout.side_file is not None:
        (folder / layout.side_file).write_text(json.dumps(layout.settings))
    else:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": layout.settings}
        path.write_text(json.dumps(config))
    return Saved(folder, reference, meant)

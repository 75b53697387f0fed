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
from autotp_serving.model_folder import INDEX_NAME
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
        extra: further tensors, by their whole names.
        others: formats of other weights than most, by a part of their names.
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
        "moe.gate.",
        "shared_expert_gate",
        "embed_out",
    )
    extra: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    def find_format(self, name: str) -> str:
        """What a weight becomes."""
        return next((one for part, one in self.others.items() if part in name), self.becomes)


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


def rename(written: Written, **names: str) -> Written:
    """The same under other names."""
    tensors, meant = written
    return {names.get(last, last): tensor for last, tensor in tensors.items()}, meant


def round_groups(
    weight: Tensor, group: int, bits: int, is_symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales [rows, groups], zeros [rows, groups], and what they mean."""
    rows, cols = weight.shape
    parts = weight.view(rows, -1, group)
    top = 2**bits - 1
    if is_symmetric:
        scales = (parts.abs().amax(2) * 2 / top).to(scale_dtype)
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.int64)
    else:
        low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
        scales = ((high - low) / top).to(scale_dtype)
        zeros = (-low / scales.float()).round().clamp(1, top).long()
    steps = (parts / scales.float()[..., None]).round() + zeros[..., None]
    codes = steps.clamp(0, top).long()
    meant = (codes - zeros[..., None]).float() * scales.float()[..., None]
    return codes.view(rows, cols), scales, zeros, meant.view(rows, cols)


def pack_low_first(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes [n, m] to int32 words [n, m * bits / 32]; place i of a word holds code order[i]."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0], codes.shape[1] // per_word, dtype=torch.int64)
    for place in range(per_word):
        number = place if order is None else order[place]
        words |= codes[:, number::per_word] << (bits * place)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def write_gptq(
    weight: Tensor,
    group: int = 128,
    bits: int = 4,
    is_symmetric: bool = True,
    version: int = 1,
    is_permuted: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    has_index: bool = True,
) -> Written:
    """AutoGPTQ's and gptqmodel's: everything transposed, zeros less one in version 1."""
    rows, cols = weight.shape
    group = cols if group == -1 else min(group, cols)
    order = torch.randperm(cols) if is_permuted else torch.arange(cols)
    codes, scales, zeros, meant = round_groups(
        weight[:, order], group, bits, is_symmetric, scale_dtype
    )
    back = torch.empty_like(order)
    back[order] = torch.arange(cols)
    codes, meant = codes[:, back], meant[:, back]
    tensors = {
        "qweight": pack_low_first(codes, bits).t(),
        "qzeros": pack_low_first(zeros.t() - int(version == 1), bits),
        "scales": scales.t(),
        "bias": torch.zeros(rows, dtype=torch.float16),
    }
    if has_index:
        tensors["g_idx"] = (back // group).int()
    return tensors, meant


def write_awq(weight: Tensor, group: int = 64) -> Written:
    """AutoAWQ's gemm: packed along the rows, in an order of its own."""
    codes, scales, zeros, meant = round_groups(weight, group, 4, False, torch.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": pack_low_first(codes.t(), 4, order),
        "qzeros": pack_low_first(zeros.t(), 4, order),
        "scales": scales.t(),
    }, meant


def write_packed(
    weight: Tensor,
    group: int = 64,
    bits: int = 4,
    is_symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Written:
    """compressed-tensors' pack-quantized."""
    size = weight.shape[1] if group == -1 else group
    codes, scales, zeros, meant = round_groups(weight, size, bits, is_symmetric, scale_dtype)
    tensors = {
        "weight_packed": pack_low_first(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not is_symmetric:
        tensors["weight_zero_point"] = pack_low_first(zeros.t(), bits).t()
    return tensors, meant


def write_int8(weight: Tensor, is_symmetric: bool = True, is_static: bool = False) -> Written:
    """compressed-tensors' int-quantized: signed bytes, a scale a row."""
    codes, scales, zeros, meant = round_groups(
        weight, weight.shape[1], 8, is_symmetric, torch.bfloat16
    )
    tensors = {"weight": (codes - 128).to(torch.int8), "weight_scale": scales}
    if not is_symmetric:
        tensors["weight_zero_point"] = (zeros - 128).to(torch.int8)
    if is_static:
        tensors["input_scale"] = torch.tensor([0.02], dtype=torch.bfloat16)
        tensors["input_zero_point"] = torch.tensor([0], dtype=torch.int8)
    return tensors, meant


NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)  # fmt: skip
FP4 = (0.0, 0.005208333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)


def write_bitsandbytes(
    weight: Tensor, kind: str = "nf4", block: int = 64, is_nested: bool = True
) -> Written:
    """bitsandbytes' Linear4bit, its scales quantized again or not."""
    levels = torch.tensor(NF4 if kind == "nf4" else (*FP4, *(-level for level in FP4)))
    parts = weight.reshape(-1, block)
    absmax = parts.abs().amax(1)
    state = {"quant_type": kind, "blocksize": block, "dtype": "float32"}
    tensors: dict[str, Tensor] = {}
    if is_nested:
        nested_levels = torch.linspace(-1, 1, 256)
        offset = absmax.mean()
        rest = absmax - offset
        padded = torch.nn.functional.pad(rest, (0, -len(rest) % 256)).view(-1, 256)
        nested_absmax = padded.abs().amax(1)
        scaled = (padded / nested_absmax[:, None]).flatten()[: len(rest)]
        stored = (scaled[:, None] - nested_levels).abs().argmin(1)
        absmax = nested_levels[stored] * nested_absmax.repeat_interleave(256)[: len(rest)] + offset
        tensors["weight.absmax"] = stored.to(torch.uint8)
        tensors["weight.nested_absmax"] = nested_absmax
        tensors["weight.nested_quant_map"] = nested_levels
        state |= {
            "nested_blocksize": 256,
            "nested_dtype": "float32",
            "nested_offset": offset.item(),
        }
    else:
        tensors["weight.absmax"] = absmax
    codes = ((parts / absmax[:, None])[..., None] - levels).abs().argmin(2)
    meant = (levels[codes] * absmax[:, None]).view(weight.shape)
    flat = codes.flatten()
    tensors["weight"] = (flat[::2] << 4 | flat[1::2]).to(torch.uint8)[:, None]
    tensors["weight.quant_map"] = levels
    text = json.dumps(state | {"shape": list(weight.shape)}).encode()
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text)).to(torch.uint8)
    return tensors, meant


def write_row_int8(weight: Tensor) -> Written:
    """bitsandbytes' Linear8bitLt."""
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round().to(torch.int8)
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0).to(torch.uint8)}
    return tensors, codes.float() * (largest / 127)[:, None]


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": scheme},
    }


def gptq(**changes: Any) -> dict[str, Any]:
    settings = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    return settings | {"quant_method": "gptq", "checkpoint_format": "gptq"} | changes


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
    "modelopt-fp8": Layout(
        lambda weight: write_scaled_fp8(weight, False, is_static=True, shape=()),
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
        "fp8_e4m3",
        side_file="hf_quant_config.json",
    ),
    "bnb-nf4-nested": Layout(
        write_bitsandbytes,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "nf4",
        tolerance=1e-3,
    ),
    "bnb-nf4-block-128": Layout(
        lambda weight: write_bitsandbytes(weight, block=128, is_nested=False),
        {"load_in_4bit": True},
        "nf4",
        tolerance=1e-3,
    ),
    "bnb-fp4": Layout(
        lambda weight: write_bitsandbytes(weight, "fp4", is_nested=False),
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        "fp4",
        is_lossless=False,
        tolerance=0.01,
    ),
    "bnb-int8": Layout(
        write_row_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "sym_int8"
    ),
    "ct-fp8-channel-dynamic": Layout(
        lambda weight: write_scaled_fp8(weight, True, torch.bfloat16),
        compressed("float-quantized", type="float", strategy="channel"),
        "fp8_e4m3",
    ),
    "ct-fp8-tensor-static": Layout(
        lambda weight: write_scaled_fp8(weight, False, torch.bfloat16, True, (1,)),
        compressed("float-quantized", type="float", strategy="tensor")
        | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        "fp8_e4m3",
        extra={
            f"model.layers.{layer}.self_attn.{kind}_scale": torch.tensor([0.1])
            for layer in range(3)
            for kind in "kv"
        },
    ),
    "ct-fp8-block": Layout(
        lambda weight: rename(write_block_fp8(weight), weight_scale_inv="weight_scale"),
        compressed("float-quantized", type="float", strategy="block", block_structure=[128, 128]),
        "fp8_e4m3",
    ),
    "ct-w8a8": Layout(write_int8, compressed("int-quantized", strategy="channel"), "sym_int8"),
    "ct-w8a8-static-asymmetric": Layout(
        lambda weight: write_int8(weight, False, True),
        compressed("int-quantized", strategy="channel", symmetric=False),
        "sym_int8",
        is_lossless=False,
        tolerance=0.01,
    ),
    "ct-w4a16": Layout(
        write_packed,
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=64),
        "sym_int4",
    ),
    "ct-w4a16-asymmetric": Layout(
        lambda weight: write_packed(weight, 128, is_symmetric=False),
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=128),
        "asym_int4",
        tolerance=1e-3,
    ),
    "ct-w8a16-channel": Layout(
        lambda weight: write_packed(weight, -1, 8),
        compressed("pack-quantized", num_bits=8, strategy="channel"),
        "sym_int8",
    ),
    "gptq": Layout(write_gptq, gptq(), "sym_int4"),
    "gptq-group-64-v2": Layout(
        lambda weight: write_gptq(weight, 64, version=2),
        gptq(group_size=64, checkpoint_format="gptq_v2"),
        "sym_int4",
    ),
    "gptq-channel-8-bits": Layout(
        lambda weight: write_gptq(weight, -1, 8),
        gptq(group_size=-1, bits=8, desc_act=True),
        "sym_int8",
    ),
    "gptq-by-layer": Layout(
        lambda weight: write_gptq(weight, 64, 8 if weight.shape[0] == 64 else 4),
        gptq(group_size=64, dynamic={"+:.*[kv]_proj": {"bits": 8}}),
        "sym_int4",
        others={"k_proj": "sym_int8", "v_proj": "sym_int8"},
    ),
    "gptq-asymmetric": Layout(
        lambda weight: write_gptq(weight, is_symmetric=False),
        gptq(sym=False),
        "asym_int4",
        tolerance=1e-3,
        side_file="quantize_config.json",
    ),
    "gptq-desc-act": Layout(
        lambda weight: write_gptq(weight, 64, is_permuted=True),
        gptq(group_size=64, desc_act=True),
        "sym_int4",
        is_lossless=False,
        tolerance=0.13,
    ),
    "gptq-group-32": Layout(
        lambda weight: write_gptq(weight, 32),
        gptq(group_size=32),
        "sym_int4",
        is_lossless=False,
        tolerance=0.13,
    ),
    "auto-round": Layout(
        lambda weight: write_gptq(weight, has_index=False),
        gptq(quant_method="auto-round", checkpoint_format=None)
        | {"packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers"},
        "sym_int4",
    ),
    "auto-round-awq": Layout(
        write_awq,
        gptq(quant_method="auto-round", checkpoint_format=None, group_size=64, sym=False)
        | {"packing_format": "auto_round:auto_awq"},
        "asym_int4",
        tolerance=1e-3,
    ),
    "awq": Layout(
        write_awq,
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True},
        "asym_int4",
        tolerance=1e-3,
    ),
    "awq-side-file": Layout(
        lambda weight: write_awq(weight, 128),
        {"w_bit": 4, "q_group_size": 128, "version": "GEMM", "zero_point": True},
        "asym_int4",
        tolerance=1e-3,
        side_file="quant_config.json",
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
    tensors, meant = quantize_folder(layout, reference, folder)
    for path in reference.glob("*.safetensors"):
        path.unlink()
    (reference / INDEX_NAME).unlink(missing_ok=True)
    save_file(tensors | meant, reference / SINGLE_NAME, metadata={"format": "pt"})
    return Saved(folder, reference, meant)


def quantize_folder(
    layout: Layout, source: Path, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write a checkpoint again, its linear layers as a producer writes them.

    Returns:
        The tensors as they were, and the weights that the written ones mean.
    """
    tensors: dict[str, Tensor] = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        is_dense = tensor.dim() != 2 or any(part in name for part in layout.dense)
        if is_dense or not name.endswith(".weight"):
            stored[name] = tensor
            continue
        parts, meant[name] = layout.write(tensor.float())
        named = {f"{name.removesuffix('.weight')}.{last}": part for last, part in parts.items()}
        # A layer's own bias comes before the zeros that a quantizer writes for one without.
        stored |= {one: part for one, part in named.items() if one == name or one not in tensors}
    ignored = shutil.ignore_patterns("*.safetensors", INDEX_NAME, "training")
    shutil.copytree(source, folder, ignore=ignored)
    stored = {name: value.contiguous() for name, value in (stored | layout.extra).items()}
    save_file(stored, folder / SINGLE_NAME, metadata={"format": "pt"})
    if layout.side_file is not None:
        (folder / layout.side_file).write_text(json.dumps(layout.settings))
    else:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": layout.settings}
        path.write_text(json.dumps(config))
    return tensors, meant

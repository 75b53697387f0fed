"""Weights as the compressed-tensors library stores them (llm-compressor's W4A16, W8A8, FP8). Every
rank.

    pack-quantized   weight_packed int32 [rows, cols * bits / 32], weight_scale [rows, groups],
                     weight_shape, and weight_zero_point int32 [rows * bits / 32, groups] or none
    int-quantized    weight int8 [rows, cols], weight_scale [rows, groups], and perhaps
                     weight_zero_point int8 [rows, groups]
    float-quantized  as fp8.py has it, the scales named weight_scale

Activations that the producer means to be quantized, by stored scales or while serving, stay in 16
bits: that is nearer to the model it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotp_serving.low_bit.formats import LowBitError
from autotp_serving.model.quantized.fp8 import is_block, make_fp8_weight
from autotp_serving.model.quantized.integers import (
    BITS,
    IntegerWeight,
    unpack_words,
)
from autotp_serving.model.quantized.settings import Quantization
from autotp_serving.model.quantized.weight import QuantizedWeight, Range, Read
from autotp_serving.model.stored_tensors import StoredTensor

LAYOUTS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("mixed-precision", "dense"),
)
SIGNED_OFFSET = 0x80


@dataclass(frozen=True)
class PackedWeight(IntegerWeight):
    """weight_packed and what belongs to it.

    Attributes:
        scale_shape: of weight_scale.
    """

    scale_shape: tuple[int, ...] = ()

    def read_codes(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """See IntegerWeight."""
        per_word = 32 // self.bits
        words = (cols[0] // per_word, -(-cols[1] // per_word))
        codes = unpack_words(read(f"{self.module}.weight_packed", (rows, words)), self.bits)
        return codes[:, : cols[1] - cols[0]]

    def read_scales(self, read: Read, rows: Range, groups: Range) -> Tensor:
        """See IntegerWeight."""
        return read_row_scales(read, f"{self.module}.weight_scale", self.scale_shape, rows, groups)

    def read_zeros(self, read: Read, rows: Range, groups: Range) -> Tensor | None:
        """See IntegerWeight."""
        name = f"{self.module}.weight_zero_point"
        if name not in self.parts:
            return None
        per_word = 32 // self.bits
        first, last = rows[0] // per_word, -(-rows[1] // per_word)
        codes = unpack_words(read(name, ((first, last), groups)).t(), self.bits)
        return codes[:, rows[0] - first * per_word : rows[1] - first * per_word].t()

    def check_index(self, read: Read) -> None:
        """See IntegerWeight."""
        name = f"{self.module}.weight_shape"
        if name in self.parts and tuple(read(name, ((0, 2),)).tolist()) != self.shape:
            raise LowBitError(f"{name} is not {list(self.shape)}, which its other tensors have")


@dataclass(frozen=True)
class Int8Weight(IntegerWeight):
    """A weight of signed bytes.

    Attributes:
        scale_shape: of weight_scale, and of weight_zero_point.
    """

    scale_shape: tuple[int, ...] = ()

    def read_codes(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """See IntegerWeight."""
        return read(f"{self.module}.weight", (rows, cols)).view(torch.uint8) ^ SIGNED_OFFSET

    def read_scales(self, read: Read, rows: Range, groups: Range) -> Tensor:
        """See IntegerWeight."""
        return read_row_scales(read, f"{self.module}.weight_scale", self.scale_shape, rows, groups)

    def read_zeros(self, read: Read, rows: Range, groups: Range) -> Tensor | None:
        """See IntegerWeight."""
        name = f"{self.module}.weight_zero_point"
        if name not in self.parts:
            return None
        zeros = read_row_scales(read, name, self.scale_shape, rows, groups)
        return (zeros + SIGNED_OFFSET).to(torch.uint8)

    def check_index(self, read: Read) -> None:
        """Nothing of the kind is stored."""


def read_row_scales(
    read: Read, name: str, shape: tuple[int, ...], rows: Range, groups: Range
) -> Tensor:
    """Scales [rows, groups] in float32, of a tensor [rows, groups], [rows], [1] or a number."""
    if all(size == 1 for size in shape):
        found = read(name, tuple((0, 1) for _ in shape)).float().view(1, 1)
        return found.expand(rows[1] - rows[0], 1)
    return read(name, (rows, groups)[: len(shape)]).float().view(rows[1] - rows[0], -1)


def find_compressed_weights(
    quantization: Quantization, stored: dict[str, StoredTensor], read: Read
) -> dict[str, QuantizedWeight]:
    """All weights that the library has compressed.

    Raises:
        ConfigError: settings or shapes that are not read here.
    """
    schemes = list(_list_schemes(quantization))
    block = next((one["block_structure"] for one in schemes if one.get("block_structure")), None)
    found: dict[str, QuantizedWeight] = {}
    for name, tensor in stored.items():
        module, _, last = name.rpartition(".")
        if last == "weight_packed":
            found[f"{module}.weight"] = _make_packed(quantization, module, stored, schemes)
        elif last == "weight" and tensor.dtype == "I8":
            found[name] = _make_int8(quantization, module, stored, schemes)
        elif last == "weight" and tensor.dtype == "F8_E4M3":
            found[name] = make_fp8_weight(quantization, name, stored, block)
    return found


def _list_schemes(quantization: Quantization) -> Iterator[dict[str, Any]]:
    """How each group of layers has its weights."""
    settings = quantization.settings
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise quantization.refuse("config_groups is no object")
    layouts = [settings.get("format")]
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            layouts.append(group.get("format"))
            block = weights.get("block_structure")
            if not is_block(block):
                raise quantization.refuse(f"block_structure {block!r:.40} is not read here")
            yield weights
    unknown = [one for one in layouts if one is not None and one not in LAYOUTS]
    if unknown:
        raise quantization.refuse(
            f"the layout {unknown[0]!r:.60} of compressed-tensors is not read here "
            f"(read are {', '.join(LAYOUTS[:4])})"
        )
    for key in ("transform_config", "sparsity_config"):
        found = settings.get(key)
        is_empty = not found or (isinstance(found, dict) and found.get("format") == "dense")
        if not is_empty and found != {"config_groups": {}}:
            raise quantization.refuse(f"its {key} is not read here")


def _make_packed(
    quantization: Quantization,
    module: str,
    stored: dict[str, StoredTensor],
    schemes: list[dict[str, Any]],
) -> PackedWeight:
    packed, scale = stored[f"{module}.weight_packed"], stored.get(f"{module}.weight_scale")
    if packed.dtype != "I32" or len(packed.shape) != 2 or scale is None:
        raise quantization.refuse(f"{module}.weight_packed is no int32 matrix with a weight_scale")
    rows, words = packed.shape
    for scheme in schemes:
        bits = scheme.get("num_bits")
        if scheme.get("type", "int") != "int" or bits not in BITS:
            continue
        cols = words * 32 // bits
        group = _find_group(scheme, scale.shape, rows, cols)
        if group is not None:
            zeros, index = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
            names = ("weight_packed", "weight_scale", "weight_shape")
            parts = [f"{module}.{name}" for name in names if f"{module}.{name}" in stored]
            expected = {
                zeros: ("I32", (-(-rows * bits // 32), -(-cols // group))),
                index: ("I32", (cols,)),
                f"{module}.weight_shape": ("I64", (2,)),
            }
            for name, (dtype, size) in expected.items():
                tensor = stored.get(name)
                if tensor is not None and (tensor.dtype, tensor.shape) != (dtype, size):
                    raise quantization.refuse(f"{name} is no {dtype} of {list(size)}")
            return PackedWeight(
                module=module,
                shape=(rows, cols),
                parts=(*parts, *(name for name in (zeros, index) if name in stored)),
                bits=bits,
                group=group,
                is_symmetric=zeros not in stored,
                group_index=index if index in stored and group < cols else None,
                scale_shape=scale.shape,
            )
    raise quantization.refuse(
        f"{module} has a weight_packed of {list(packed.shape)} and a weight_scale of "
        f"{list(scale.shape)}, which fit no scheme of 4 or 8 bits in config_groups"
    )


def _make_int8(
    quantization: Quantization,
    module: str,
    stored: dict[str, StoredTensor],
    schemes: list[dict[str, Any]],
) -> Int8Weight:
    weight, scale = stored[f"{module}.weight"], stored.get(f"{module}.weight_scale")
    if len(weight.shape) != 2 or scale is None:
        raise quantization.refuse(f"{module}.weight is stored in int8 without a weight_scale")
    rows, cols = weight.shape
    sizes = (_find_group(scheme, scale.shape, rows, cols) for scheme in (*schemes, {}))
    group = next((size for size in sizes if size is not None), None)
    zeros = f"{module}.weight_zero_point"
    has_zeros = zeros in stored
    if group is None or (has_zeros and stored[zeros].shape != scale.shape):
        raise quantization.refuse(
            f"{module} has a weight_scale of {list(scale.shape)} for a weight of {[rows, cols]}, "
            "which fits no scheme in config_groups"
        )
    parts = [f"{module}.weight", f"{module}.weight_scale"]
    return Int8Weight(
        module=module,
        shape=(rows, cols),
        parts=(*parts, zeros) if has_zeros else tuple(parts),
        bits=8,
        group=group,
        is_symmetric=not has_zeros,
        scale_shape=scale.shape,
    )


def _find_group(
    scheme: dict[str, Any], scale_shape: tuple[int, ...], rows: int, cols: int
) -> int | None:
    """Columns of a group by the scheme's size and the shape of the scales; None if they differ."""
    if all(size == 1 for size in scale_shape) or scale_shape in ((rows,), (rows, 1)):
        return cols
    size = scheme.get("group_size")
    if type(size) is not int or size < 1 or scale_shape != (rows, -(-cols // size)):
        return None
    return size

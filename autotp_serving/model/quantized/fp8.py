"""Weights in float8 with scales: of a block, a channel or the whole tensor. Every rank.

Read are quant_method "fp8" (block scales `weight_scale_inv` as DeepSeek and Qwen publish them, or
one `weight_scale`), "fbgemm_fp8", ModelOpt's FP8, and what compressed_tensors.py hands over. In all
of them a weight is its number times its scale.

The bytes of e4m3 are those of `fp8_e4m3` here, whose levels are 2**-8 times as large: only the
scale changes, by a power of two, so every weight is the same float32 number as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autotp_serving.low_bit.formats import BLOCK, Format, LowBitError, num_blocks
from autotp_serving.low_bit.tensor import LowBitTensor
from autotp_serving.model.quantized.settings import Quantization
from autotp_serving.model.quantized.weight import (
    QuantizedWeight,
    Range,
    Read,
    as_format,
    spread,
    touched,
)
from autotp_serving.model.stored_tensors import StoredTensor

LEVEL_UNIT = 2.0**8
"""How much larger the levels of float8_e4m3fn are than ours."""

NAN_CODES = (0x7F, 0xFF)

SCALE_NAMES = ("weight_scale_inv", "weight_scale")
ACTIVATION_NAMES = (
    *("input_scale", "input_scale_inv", "input_scale_ub", "input_zero_point"),
    *("activation_scale", "activation_scale_inv"),
)

MODELOPT_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


@dataclass(frozen=True)
class Fp8Weight:
    """A weight in float8 and its scales.

    Attributes:
        name: of the stored weight.
        scale: name of its scales.
        scale_dims: dimensions of the stored scales.
        block: rows and columns that share a scale.
        is_e4m3: else e5m2.
    """

    name: str
    shape: tuple[int, int]
    scale: str
    scale_dims: int
    block: tuple[int, int]
    is_e4m3: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """See QuantizedWeight."""
        return self.name, self.scale

    @property
    def format(self) -> Format | None:
        """See QuantizedWeight."""
        fits = self.block[1] % BLOCK == 0 or self.block[1] >= self.shape[1]
        return self.fallback if fits and self.is_e4m3 else None

    @property
    def fallback(self) -> Format:
        """See QuantizedWeight."""
        return as_format("fp8_e4m3")

    def repack(self, read: Read, rows: Range, cols: Range) -> LowBitTensor:
        """See QuantizedWeight."""
        codes = read(self.name, (rows, cols)).view(torch.uint8)
        if any((codes == code).any() for code in NAN_CODES):
            raise LowBitError("the stored float8 weight holds NaN")
        scales = self._read_scales(read, rows, cols)
        blocks = num_blocks(cols[1] - cols[0])
        codes = functional.pad(codes, (0, blocks * BLOCK - codes.shape[1]))
        planes = {"codes": codes, "scales": spread(scales * LEVEL_UNIT, self.block[1], cols)}
        return LowBitTensor(self.fallback, (rows[1] - rows[0], cols[1] - cols[0]), planes)

    def decode(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """See QuantizedWeight."""
        values = read(self.name, (rows, cols)).float()
        if not values.isfinite().all():
            raise LowBitError("the stored float8 weight holds NaN or infinity")
        scales = self._read_scales(read, rows, cols)
        index = torch.arange(*cols) // self.block[1] - cols[0] // self.block[1]
        return values.mul_(scales.index_select(1, index))

    def _read_scales(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """Float32 [rows, the groups of columns that are touched]."""
        row_blocks, col_blocks = touched(rows, self.block[0]), touched(cols, self.block[1])
        ranges = (row_blocks, col_blocks)[: self.scale_dims]
        scales = read(self.scale, ranges).float().view(row_blocks[1] - row_blocks[0], -1)
        if not scales.isfinite().all():
            raise LowBitError(f"{self.scale} holds NaN or infinity")
        index = torch.arange(*rows) // self.block[0] - row_blocks[0]
        return scales.index_select(0, index)


def find_fp8_weights(
    quantization: Quantization, stored: dict[str, StoredTensor], read: Read
) -> dict[str, QuantizedWeight]:
    """All weights in float8 of a folder.

    Raises:
        ConfigError: settings or shapes that are not read here.
    """
    block = quantization.get("weight_block_size", None, is_block)
    found: dict[str, QuantizedWeight] = {}
    for name, tensor in stored.items():
        if name.endswith(".weight") and tensor.dtype in ("F8_E4M3", "F8_E5M2"):
            found[name] = make_fp8_weight(quantization, name, stored, block)
    return found


def find_modelopt_weights(
    quantization: Quantization, stored: dict[str, StoredTensor], read: Read
) -> dict[str, QuantizedWeight]:
    """The same of ModelOpt, which has other formats too.

    Raises:
        ConfigError: one of those.
    """
    algorithm = quantization.settings.get("quant_algo")
    if algorithm not in MODELOPT_ALGORITHMS:
        raise quantization.refuse(f"ModelOpt's {algorithm!r:.40} is not read here, only FP8")
    return find_fp8_weights(quantization, stored, read)


def make_fp8_weight(
    quantization: Quantization, name: str, stored: dict[str, StoredTensor], block: list[int] | None
) -> Fp8Weight:
    """One weight and its scales.

    Args:
        block: rows and columns of a scale, where the settings tell.

    Raises:
        ConfigError: no scale, or one of a shape that is not read here.
    """
    tensor = stored[name]
    module = name.removesuffix(".weight")
    scale = next(
        (one for one in (f"{module}.{last}" for last in SCALE_NAMES) if one in stored), None
    )
    if scale is None or len(tensor.shape) != 2:
        raise quantization.refuse(f"{name} is stored in float8 without a scale")
    rows, cols = tensor.shape
    shape = stored[scale].shape
    if all(size == 1 for size in shape):
        shared = (rows, cols)
    elif shape in ((rows,), (rows, 1)):
        shared = (1, cols)
    elif block and shape == (-(-rows // block[0]), -(-cols // block[1])):
        shared = (block[0], block[1])
    else:
        raise quantization.refuse(
            f"{scale} has shape {list(shape)}, which fits no way to scale {name} of shape "
            f"{[rows, cols]} (blocks of {block})"
        )
    return Fp8Weight(name, (rows, cols), scale, len(shape), shared, tensor.dtype == "F8_E4M3")


def is_block(value: object) -> bool:
    """True for the rows and columns of a block, or None."""
    if value is None:
        return True
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(size) is int and 0 < size <= 2**20 for size in value)
    )

"""What the kernels that multiply by a weight's tiles are told of it. Ranks on CUDA."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor

from autotp_serving.kernels.cpu.linear import find_levels
from autotp_serving.kernels.cuda.activations import Activations
from autotp_serving.kernels.cuda.nvrtc import Argument, Long
from autotp_serving.kernels.cuda.tiles import CudaTensor
from autotp_serving.low_bit.formats import FORMATS, Format, num_blocks, split_code_bits

TOKENS = 8
"""Tokens of a tile of activations."""

LANES = 32


def find_format_name(weight: CudaTensor | Tensor) -> str | None:
    """Of its format; None: it is bfloat16."""
    return None if isinstance(weight, Tensor) else weight.format.name


def find_kind(format: Format) -> int:
    """KIND of csrc/weights.cuh."""
    if format.kind in ("symmetric", "asymmetric"):
        return 0
    return 1 if format.code_bits <= 4 else 2


def describe_format(format: Format | None) -> dict[str, object]:
    """Macros of csrc/weights.cuh; None: bfloat16."""
    if format is None:
        names = ("LOW_BITS", "HIGH_BITS", "KIND", "SCALE_BYTES", "MINS", "MANTISSA_BITS")
        return dict(zip(names, (16, 0, 3, 0, "false", 0), strict=True))
    low_bits, high_bits = split_code_bits(format.code_bits)
    return {
        "LOW_BITS": low_bits,
        "HIGH_BITS": high_bits,
        "KIND": find_kind(format),
        "SCALE_BYTES": {"float16": 2, "float32": 4, None: 0}[format.scale_dtype],
        "MINS": "true" if format.kind == "asymmetric" else "false",
        "MANTISSA_BITS": format.mantissa_bits,
    }


def write_defines(values: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Macros as `load_kernel` takes them."""
    return tuple((name, str(value)) for name, value in values.items())


@functools.cache
def find_table(format_name: str | None) -> tuple[float, bytes]:
    """What a step of a format's codes is worth, and its table of 16 signed bytes, if it has one."""
    if format_name is None or find_kind(FORMATS[format_name]) != 1:
        return 1.0, bytes(16)
    table, unit, offset = find_levels(FORMATS[format_name])
    signed = [int(level) - offset & 0xFF for level in table.tolist()]
    return unit, bytes(signed).ljust(16, b"\0")


def list_arguments(
    x: Activations, weight: CudaTensor | Tensor, out: Tensor, rows: int
) -> tuple[Argument, ...]:
    """What every such kernel is given first: weight, activations, result, sizes, table."""
    planes = {"codes": weight} if isinstance(weight, Tensor) else weight.planes
    unit, table = find_table(find_format_name(weight))
    return (
        *(planes.get(name) for name in ("codes", "high", "scales", "mins")),
        *(x.plain if x.codes is None else x.codes, x.scales, x.sums),
        *(out, Long(num_blocks(weight.shape[1])), rows, x.num_tokens, unit, table),
    )

"""Products with low-bit and bfloat16 weights on a CUDA card, by csrc/products.cu. Ranks on CUDA.

Up to MOST_FEW tokens a kernel reads the weight's bytes once, as fast as memory gives them, and
multiplies on the tensor cores; a token's result is bitwise the same whatever stands beside it.
More tokens are multiplied by cuBLAS, a part of the rows at a time: dequantized into a workspace
that the second-level cache holds, and forgotten.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autotp_serving.devices.build import BuildError
from autotp_serving.kernels.cpu.linear import find_levels
from autotp_serving.kernels.cuda.activations import Activations, Rounding, quantize_tokens
from autotp_serving.kernels.cuda.nvrtc import Kernel, Long, Words, load_kernel
from autotp_serving.kernels.cuda.tiles import ROWS, CudaTensor
from autotp_serving.low_bit.formats import (
    BLOCK,
    FORMATS,
    Format,
    num_blocks,
    split_code_bits,
)
from autotp_serving.low_bit.numerics import decode

logger = logging.getLogger(__name__)

SOURCE = "products.cu"
TOKENS = 8
LANES = 32
MOST_AT_ONCE = 64
MOST_FEW = 128
"""Tokens up to which a weight is multiplied as it is, MOST_AT_ONCE at a time."""

MOST_FEW_DENSE = 8
"""Tokens up to which a bfloat16 weight is multiplied here and not by cuBLAS."""

MANY_TOKENS = 2048
"""Tokens from which on it pays to keep dequantized rows in the second-level cache."""

WIDE_ROWS = 8192
"""Rows from which a weight alone keeps the card busy, though few warps share its columns."""

LEAST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 on its tensor cores."""

CHUNK_ROWS = 1024
"""Rows dequantized at once, in multiples of what keeps the whole card busy."""


@dataclass(frozen=True)
class Tiling:
    """How csrc/products.cu is cut: warps that share the columns, tiles of 8 tokens, tiles of 16
    rows that a warp takes at once, and tiles that it reads ahead.
    """

    warps: int
    token_tiles: int
    row_tiles: int
    depth: int


DEQUANTIZE = Tiling(8, 1, 1, 1)


@functools.cache
def choose_tiling(num_tokens: int, rows: int, format_name: str | None) -> Tiling:
    """The fastest by benchmarks/gpu_products.py on an H200 and an H100; None: bfloat16.

    `warps` alone decides how sums are rounded; it is the same up to 16 tokens.
    """
    token_tiles = next(n for n in (1, 2, 4, 8) if n * TOKENS >= num_tokens)
    if format_name is None:
        return Tiling(16, token_tiles, 2 if token_tiles <= 4 else 1, 1)
    format = FORMATS[format_name]
    is_wide, is_small = rows >= WIDE_ROWS, format.code_bits < 8
    if token_tiles == 1:
        if is_wide:
            return Tiling(8, 1, 2, 1) if format_name == "sym_int4" else Tiling(8, 1, 1, 2)
        return Tiling(16, 1, 1, 2 if is_small else 1)
    if token_tiles == 2:
        return Tiling(8, 2, 1, 2) if is_wide else Tiling(16, 2, 2, 1)
    if token_tiles == 4:
        return Tiling(4, 4, 2, 2 if is_small else 1) if is_wide else Tiling(16, 4, 2, 1)
    return Tiling(4 if is_wide else 8, 8, 2, 2 if is_small else 1)


@functools.cache
def can_multiply(device_index: int) -> bool:
    """Whether a card can run these kernels; a line in the log where it cannot."""
    if torch.version.cuda is None or (
        torch.cuda.get_device_capability(device_index) < LEAST_CAPABILITY
    ):
        return False
    try:
        load_kernel("activations.cu", "quantize_tokens", (), device_index)
    except (BuildError, OSError, RuntimeError) as error:
        logger.warning("Low-bit weights are multiplied by portable torch, slowly: %s", error)
        return False
    return True


def rounding_of(format: Format | None, num_tokens: int) -> Rounding:
    """What the product of a format (None: bfloat16) with so many tokens takes."""
    if format is None or _kind(format) == 2:
        return Rounding.NONE
    return Rounding.INTEGERS if num_tokens <= MOST_FEW else Rounding.VALUES


def multiply(x: Tensor, weight: CudaTensor) -> Tensor:
    """x [num_tokens, columns] times weight [rows, columns] transposed: [num_tokens, rows].

    Computed from bfloat16, in the type of `x`.
    """
    if x.dtype != torch.bfloat16:
        return multiply(x.bfloat16(), weight).to(x.dtype)
    columns = num_blocks(weight.shape[1]) * BLOCK
    if columns != x.shape[1]:
        x = functional.pad(x, (0, columns - x.shape[1]))
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous()
    return multiply_activations(quantize_tokens(x, rounding_of(weight.format, len(x))), weight)


def multiply_activations(x: Activations, weight: CudaTensor | Tensor) -> Tensor:
    """The same of activations rounded as `rounding_of` says; `weight` may be plain bfloat16."""
    if isinstance(weight, Tensor):
        few = x.num_tokens <= MOST_FEW_DENSE and not (weight.shape[0] % ROWS or x.columns % BLOCK)
        return multiply_few(x, weight) if few else functional.linear(x.plain, weight)
    if x.num_tokens <= MOST_FEW:
        return multiply_few(x, weight)
    return multiply_many(x.plain, weight)


def multiply_few(
    x: Activations, weight: CudaTensor | Tensor, tiling: Tiling | None = None
) -> Tensor:
    """Multiply some tokens by the weight as it lies in memory."""
    rows = weight.shape[0]
    out = torch.empty(x.num_tokens, rows, dtype=torch.bfloat16, device=x.device)
    num_parts = -(-x.num_tokens // MOST_AT_ONCE)
    step = -(-x.num_tokens // (num_parts * TOKENS)) * TOKENS if num_parts else 1
    for start in range(0, x.num_tokens, step):
        stop = min(start + step, x.num_tokens)
        _multiply_part(x.slice(start, stop), weight, out[start:stop], tiling)
    return out


def _multiply_part(
    x: Activations, weight: CudaTensor | Tensor, out: Tensor, tiling: Tiling | None
) -> None:
    """Multiply at most MOST_AT_ONCE tokens into `out` [num_tokens, rows]."""
    rows, columns = weight.shape
    blocks = num_blocks(columns)
    dense = isinstance(weight, Tensor)
    format_name = None if dense else weight.format.name
    tiling = tiling or choose_tiling(x.num_tokens, rows, format_name)
    planes = {"codes": weight} if dense else weight.planes
    unit, words = _table(format_name)
    row_tiles = -(-rows // ROWS)
    kernel = _kernel("multiply_few", format_name, tiling, out.device.index)
    kernel(
        (-(-row_tiles // tiling.row_tiles), 1),
        tiling.warps * LANES,
        (
            *(planes.get(name) for name in ("codes", "high", "scales", "mins")),
            *(x.plain if x.codes is None else x.codes, x.scales, x.sums),
            *(out, Long(blocks), rows, x.num_tokens, unit, words),
        ),
    )


def multiply_many(x: Tensor, weight: CudaTensor, chunk_rows: int | None = None) -> Tensor:
    """Multiply any number of tokens, x [num_tokens, columns], a part of the rows at a time."""
    num_tokens, columns = x.shape
    rows = weight.shape[0]
    # Few tokens are over before the host has launched many parts.
    chunk_weights = 2**24 if num_tokens > MANY_TOKENS else 2**25
    step = chunk_rows or -(-chunk_weights // (columns * CHUNK_ROWS)) * CHUNK_ROWS
    out = torch.empty(num_tokens, rows, dtype=x.dtype, device=x.device)
    workspace = torch.empty(min(step, weight.padded_rows), columns, dtype=x.dtype, device=x.device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        dequantize_rows(weight, start, stop, workspace)
        part = workspace[: stop - start]
        torch.mm(x, part.t(), out=out[:, start:stop])
    return out


def dequantize_rows(weight: CudaTensor, start: int, stop: int, to: Tensor) -> None:
    """Rows `start` to `stop` as bfloat16 into `to`; `start` is a multiple of 16."""
    blocks = num_blocks(weight.shape[1])
    codes = weight.planes["codes"]
    levels = _float_levels(weight.format.name, codes.device)
    _kernel("dequantize_tiles", weight.format.name, DEQUANTIZE, codes.device.index)(
        (-(-(stop - start) // ROWS), -(-blocks // DEQUANTIZE.warps)),
        DEQUANTIZE.warps * LANES,
        (
            *(weight.planes.get(name) for name in ("codes", "high", "scales", "mins")),
            *(to, Long(blocks), start // ROWS, levels),
        ),
        overlaps=False,
    )


def _kind(format: Format) -> int:
    """KIND of csrc/products.cu."""
    if format.kind in ("symmetric", "asymmetric"):
        return 0
    return 1 if format.code_bits <= 4 else 2


def make_defines(format: Format | None, tiling: Tiling) -> tuple[tuple[str, str], ...]:
    """What csrc/products.cu is told of a format (None: bfloat16) and a tiling."""
    defines = {
        "WARPS": tiling.warps,
        "TOKEN_TILES": tiling.token_tiles,
        "ROW_TILES": tiling.row_tiles,
        "DEPTH": tiling.depth,
        "LOW_BITS": 16,
        "HIGH_BITS": 0,
        "KIND": 3,
        "SCALE_BYTES": 0,
        "MINS": "false",
        "MANTISSA_BITS": 0,
    }
    if format is not None:
        defines["LOW_BITS"], defines["HIGH_BITS"] = split_code_bits(format.code_bits)
        defines["KIND"] = _kind(format)
        defines["SCALE_BYTES"] = {"float16": 2, "float32": 4, None: 0}[format.scale_dtype]
        defines["MINS"] = "true" if format.kind == "asymmetric" else "false"
        defines["MANTISSA_BITS"] = format.mantissa_bits
    return tuple((name, str(value)) for name, value in defines.items())


@functools.cache
def _kernel(name: str, format_name: str | None, tiling: Tiling, device_index: int) -> Kernel:
    """`format_name` stands for the format, which takes long to hash; None: bfloat16."""
    format = None if format_name is None else FORMATS[format_name]
    return load_kernel(SOURCE, name, make_defines(format, tiling), device_index)


@functools.cache
def _table(format_name: str | None) -> tuple[float, Words]:
    """What a step of a format's codes is worth, and its table of 16 signed bytes, if it has one."""
    words = Words()
    if format_name is None or _kind(FORMATS[format_name]) != 1:
        return 1.0, words
    table, unit, offset = find_levels(FORMATS[format_name])
    signed = [int(level) - offset & 0xFF for level in table.tolist()]
    signed += [0] * (16 - len(signed))
    for index in range(4):
        words.words[index] = int.from_bytes(bytes(signed[4 * index : 4 * index + 4]), "little")
    return unit, words


@functools.cache
def _float_levels(format_name: str, device: torch.device) -> Tensor | None:
    """What each code stands for, float32, in formats that look it up."""
    format = FORMATS[format_name]
    if _kind(format) == 0:
        return None
    codes = torch.arange(2**format.code_bits, dtype=torch.uint8)[:, None]
    return decode(codes, None, None, format).flatten().to(device)

"""Products with low-bit and bfloat16 weights on a CUDA card, by csrc/products.cu. Ranks on CUDA.

Up to MOST_FEW tokens a kernel reads the weight's bytes once, as fast as memory gives them, and
multiplies on the tensor cores; a token's result is bitwise the same whatever stands beside it.
More tokens are multiplied by wide_products.py on Hopper. Thousands, and on other cards any, are
multiplied by cuBLAS, a part of the rows at a time: dequantized into a workspace that the
second-level cache holds, and forgotten.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autotp_serving.devices.build import BuildError
from autotp_serving.kernels.cuda.activations import Activations, Rounding, quantize_tokens
from autotp_serving.kernels.cuda.batch_products import can_batch, multiply_batch
from autotp_serving.kernels.cuda.nvrtc import Kernel, Long, load_kernel
from autotp_serving.kernels.cuda.tiles import ROWS, CudaTensor
from autotp_serving.kernels.cuda.weights import (
    LANES,
    TOKENS,
    describe_format,
    find_format_name,
    find_kind,
    list_arguments,
    write_defines,
)
from autotp_serving.kernels.cuda.wide_products import can_multiply_wide, multiply_wide
from autotp_serving.low_bit.formats import (
    BLOCK,
    FORMATS,
    Format,
    num_blocks,
)
from autotp_serving.low_bit.numerics import decode

logger = logging.getLogger(__name__)

SOURCE = "products.cu"
MOST_AT_ONCE = 64
MOST_FEW = 128
"""Tokens up to which a weight is multiplied as it is, MOST_AT_ONCE at a time."""

MOST_FEW_INTEGERS = 256
"""The same of integer formats where batch_products.py multiplies them."""

FEWEST_IN_BATCH = 16
"""Tokens from which on batch_products.py is quicker, on cards that it is for."""

FEWEST_WIDE = 65
"""Tokens from which on wide_products.py is quicker, on cards that it is for."""

MOST_WIDE = 2048
"""Tokens up to which it is; beyond, cuBLAS makes up for dequantizing."""

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

STAGED_FORMATS = ("sym_int8", "asym_int4")
"""Formats in which it is quicker to keep activations in shared memory than to read them from the
caches, by benchmarks/gpu_step.py on an H200."""

MOST_STAGED = 64 * 2**10
"""Bytes of activations in a thread block's shared memory: two blocks have room for theirs."""


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


@functools.cache
def count_most_few(format: Format) -> int:
    """Tokens up to which a weight is multiplied as it is on this rank's card."""
    has_quick_batches = find_kind(format) != 2 and can_batch(torch.cuda.current_device())
    return MOST_FEW_INTEGERS if has_quick_batches else MOST_FEW


def rounding_of(format: Format | None, num_tokens: int) -> Rounding:
    """What the product of a format (None: bfloat16) with so many tokens takes."""
    if format is None:
        return Rounding.NONE
    is_wide = FEWEST_WIDE <= num_tokens <= MOST_WIDE
    is_wide = is_wide and can_multiply_wide(torch.cuda.current_device())
    if find_kind(format) == 2:
        return Rounding.WIDE if is_wide else Rounding.NONE
    if is_wide:
        return Rounding.WIDE_VALUES
    return Rounding.INTEGERS if num_tokens <= count_most_few(format) else Rounding.VALUES


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
    if x.wide is not None:
        return multiply_wide(x, weight)
    if x.num_tokens > count_most_few(weight.format):
        return multiply_many(x.plain, weight)
    # Two rows are written at a time there.
    in_batch = x.num_tokens > FEWEST_IN_BATCH and weight.shape[0] % 2 == 0
    if in_batch and can_batch(x.device.index):
        return multiply_batch(x, weight)
    return multiply_few(x, weight)


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
    rows = weight.shape[0]
    format_name = find_format_name(weight)
    tiling = tiling or choose_tiling(x.num_tokens, rows, format_name)
    row_tiles = -(-rows // ROWS)
    staged_bytes = count_staged_bytes(x, format_name, tiling)
    is_staged = staged_bytes > 0
    kernel = load_product("multiply_few", format_name, tiling, out.device.index, False, is_staged)
    kernel(
        (-(-row_tiles // tiling.row_tiles), 1),
        tiling.warps * LANES,
        (*list_arguments(x, weight, out, rows), None, None, 1),
        shared_bytes=staged_bytes,
    )


def count_staged_bytes(x: Activations, format_name: str | None, tiling: Tiling) -> int:
    """What `stage` of csrc/fragments.cuh takes; 0: activations stay where they are."""
    if tiling.token_tiles > 1 or format_name not in STAGED_FORMATS:
        return 0
    size = num_blocks(x.columns) * (x.num_tokens * BLOCK + 2 * TOKENS * 4)
    return size if size <= MOST_STAGED else 0


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
    load_product("dequantize_tiles", weight.format.name, DEQUANTIZE, codes.device.index)(
        (-(-(stop - start) // ROWS), -(-blocks // DEQUANTIZE.warps)),
        DEQUANTIZE.warps * LANES,
        (
            *(weight.planes.get(name) for name in ("codes", "high", "scales", "mins")),
            *(to, Long(blocks), start // ROWS, levels),
        ),
        overlaps=False,
    )


def make_defines(
    format: Format | None, tiling: Tiling, *, is_grouped: bool = False, is_staged: bool = False
) -> tuple[tuple[str, str], ...]:
    """What csrc/products.cu is told of a format (None: bfloat16) and a tiling."""
    defines = {
        "GROUPED": "true" if is_grouped else "false",
        "STAGED": "true" if is_staged else "false",
        "WARPS": tiling.warps,
        "TOKEN_TILES": tiling.token_tiles,
        "ROW_TILES": tiling.row_tiles,
        "DEPTH": tiling.depth,
    }
    return write_defines({**describe_format(format), **defines})


@functools.cache
def load_product(
    name: str,
    format_name: str | None,
    tiling: Tiling,
    device_index: int,
    is_grouped: bool = False,
    is_staged: bool = False,
) -> Kernel:
    """`format_name` stands for the format, which takes long to hash; None: bfloat16."""
    format = None if format_name is None else FORMATS[format_name]
    defines = make_defines(format, tiling, is_grouped=is_grouped, is_staged=is_staged)
    return load_kernel(SOURCE, name, defines, device_index)


@functools.cache
def _float_levels(format_name: str, device: torch.device) -> Tensor | None:
    """What each code stands for, float32, in formats that look it up."""
    format = FORMATS[format_name]
    if find_kind(format) == 0:
        return None
    codes = torch.arange(2**format.code_bits, dtype=torch.uint8)[:, None]
    return decode(codes, None, None, format).flatten().to(device)

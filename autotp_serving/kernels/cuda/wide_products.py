"""Products of a low-bit weight with many tokens, by csrc/wide_products.cu. Ranks on CUDA.

The weight is made bfloat16 in registers on its way to the tensor cores, and never written. For
Hopper, whose tensor cores take one side from registers and the other from shared memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from autotp_serving.kernels.cuda.activations import Activations
from autotp_serving.kernels.cuda.nvrtc import Kernel, Long, load_kernel
from autotp_serving.kernels.cuda.tiles import CudaTensor
from autotp_serving.kernels.cuda.weights import LANES, describe_format, find_kind, write_defines
from autotp_serving.low_bit.formats import BLOCK, FORMATS, num_blocks
from autotp_serving.low_bit.numerics import decode

SOURCE = "wide_products.cu"
CAPABILITY = (9, 0)
ROWS = 64
SHARED_BYTES = 227 * 2**10
MOST_STAGES = 8
DEPTH = 4
"""Blocks of weights that are read ahead."""

STARTING = 3.5
"""Microseconds of a thread block beside its products, on an H200."""

SHARING = 0.4
"""The same for each of those that share the columns."""

BUSY = {1: 1.0, 2: 0.97, 3: 0.9, 4: 0.84}
"""Part of the multiprocessors that clusters of so many thread blocks can fill."""


@dataclass(frozen=True)
class WideTiling:
    """How csrc/wide_products.cu is cut.

    Attributes:
        tokens: of a thread block, and of one instruction.
        warpgroups: of a thread block, 64 rows each.
        splits: thread blocks that share the columns.
    """

    tokens: int
    warpgroups: int
    splits: int = 1

    @property
    def rows(self) -> int:
        """Of a thread block."""
        return self.warpgroups * ROWS


MICROSECONDS = {WideTiling(128, 2): 0.57, WideTiling(128, 3): 0.72, WideTiling(256, 2): 0.7}
"""Of a block of 64 columns, by benchmarks/gpu_products.py in sym_int4 on an H200."""

TILINGS = [replace(tiling, splits=splits) for tiling in MICROSECONDS for splits in BUSY]


class Layout(NamedTuple):
    """Of a thread block's shared memory, in bytes, and blocks of activations in it."""

    stages: int
    weights_at: int
    barriers_at: int
    num_bytes: int


@functools.cache
def lay_out(format_name: str, tiling: WideTiling) -> Layout:
    """Blocks of activations, as many as there is room for, or sums; weights; barriers."""
    format = FORMATS[format_name]
    scale_bytes = {"float16": 2, "float32": 4, None: 0}[format.scale_dtype]
    of_row = BLOCK * format.code_bits // 8 + scale_bytes + 2 * (format.kind == "asymmetric")
    weights = tiling.rows * DEPTH * of_row
    stage_bytes = tiling.tokens * BLOCK * 2
    stages = min(MOST_STAGES, (SHARED_BYTES - weights - 16 * MOST_STAGES) // stage_bytes)
    sums = tiling.tokens * (tiling.rows + 4) * 4
    result = tiling.tokens * (tiling.rows * 2 + 16)
    weights_at = max(stages * stage_bytes, result if tiling.splits == 1 else sums)
    barriers_at = weights_at + weights
    return Layout(stages, weights_at, barriers_at, barriers_at + 16 * stages)


@functools.cache
def can_multiply_wide(device_index: int) -> bool:
    """Whether a card is a Hopper."""
    return torch.cuda.get_device_capability(device_index) == CAPABILITY


class Part(NamedTuple):
    """Some rows of a product: blocks of rows as their tiling has them."""

    first: int
    row_blocks: int
    tiling: WideTiling


@functools.cache
def plan(token_tiles: int, rows: int, columns: int, processors: int) -> tuple[Part, ...]:
    """The quickest way by what tilings take on an H200: alike, or with more splits at the end.

    Args:
        token_tiles: tiles of 128 tokens.
    """
    found: list[tuple[float, tuple[Part, ...]]] = []
    for tiling in MICROSECONDS:
        row_blocks = -(-rows // tiling.rows)
        beside = -(-token_tiles * 128 // tiling.tokens)
        # Rows that keep all multiprocessors busy to the end.
        full = row_blocks * beside // processors * processors // beside
        for first in {0, full}:
            before = _estimate(tiling, first * beside, columns, processors)
            parts = (Part(0, first, tiling),) if first else ()
            rest = row_blocks - first
            if rest == 0:
                found.append((before, parts))
                continue
            for splits in BUSY:
                last = replace(tiling, splits=splits)
                after = _estimate(last, rest * beside, columns, processors)
                found.append((before + after, (*parts, Part(first, rest, last))))
    return min(found, key=lambda pair: pair[0])[1]


def _estimate(tiling: WideTiling, tiles: int, columns: int, processors: int) -> float:
    """Microseconds of so many tiles."""
    at_once = int(processors * BUSY[tiling.splits]) // tiling.splits
    blocks = -(-num_blocks(columns) // tiling.splits)
    of_block = MICROSECONDS[replace(tiling, splits=1)]
    return -(-tiles // at_once) * (blocks * of_block + STARTING + SHARING * tiling.splits)


def multiply_wide(x: Activations, weight: CudaTensor, tiling: WideTiling | None = None) -> Tensor:
    """[num_tokens, rows] bfloat16 of activations in the order that it takes."""
    rows, columns = weight.shape
    out = torch.empty(x.num_tokens, rows, dtype=torch.bfloat16, device=x.device)
    if tiling is None:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        parts = plan(-(-x.num_tokens // 128), rows, columns, processors)
    else:
        parts = (Part(0, -(-rows // tiling.rows), tiling),)
    for part in parts:
        _launch(x, weight, out, part)
    return out


def _launch(x: Activations, weight: CudaTensor, out: Tensor, part: Part) -> None:
    """Multiply some blocks of rows."""
    planes, format, tiling = weight.planes, weight.format, part.tiling
    layout = lay_out(format.name, tiling)
    _load(format.name, tiling, x.device.index)(
        (tiling.splits, part.row_blocks * -(-x.num_tokens // tiling.tokens)),
        tiling.warpgroups * 4 * LANES,
        (
            *(planes.get(name) for name in ("codes", "high", "scales", "mins")),
            *(x.wide, out, Long(num_blocks(weight.shape[1])), weight.shape[0]),
            *(part.first, part.row_blocks, x.num_tokens),
            *(*find_level_bytes(format.name), layout.weights_at, layout.barriers_at),
        ),
        shared_bytes=layout.num_bytes,
    )


@functools.cache
def find_level_bytes(format_name: str) -> tuple[bytes, bytes]:
    """Low and high bytes of a table's 16 levels in bfloat16; zeros in formats without a table."""
    format = FORMATS[format_name]
    if find_kind(format) != 1:
        return bytes(16), bytes(16)
    codes = torch.arange(2**format.code_bits, dtype=torch.uint8)[:, None]
    levels = decode(codes, None, None, format).flatten().bfloat16().view(torch.int16).tolist()
    low = bytes(level & 0xFF for level in levels)
    high = bytes(level >> 8 & 0xFF for level in levels)
    return low.ljust(16, b"\0"), high.ljust(16, b"\0")


@functools.cache
def _load(format_name: str, tiling: WideTiling, device_index: int) -> Kernel:
    return load_kernel(SOURCE, "multiply_wide", make_defines(format_name, tiling), device_index)


def make_defines(format_name: str, tiling: WideTiling) -> tuple[tuple[str, str], ...]:
    """What csrc/wide_products.cu is told."""
    return write_defines(
        {
            **describe_format(FORMATS[format_name]),
            "TOKENS": tiling.tokens,
            "DEPTH": DEPTH,
            "STAGES": lay_out(format_name, tiling).stages,
            "SPLITS": tiling.splits,
            "WARPGROUPS": tiling.warpgroups,
        }
    )

"""Products of a low-bit weight with many tokens, by csrc/wide_products.cu. Ranks on CUDA.

The weight is made bfloat16 in registers on its way to the tensor cores, and never written. For
Hopper, whose tensor cores take one side from registers and the other from shared memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.kernels.cuda.activations import Activations
from autotp_serving.kernels.cuda.nvrtc import Kernel, Long, Words, load_kernel
from autotp_serving.kernels.cuda.tiles import CudaTensor
from autotp_serving.kernels.cuda.weights import LANES, describe_format, find_kind, write_defines
from autotp_serving.low_bit.formats import BLOCK, FORMATS, num_blocks
from autotp_serving.low_bit.numerics import decode

SOURCE = "wide_products.cu"
CAPABILITY = (9, 0)
WARPS = 8
ROWS = 128
SHARED_BYTES = 227 * 2**10
MOST_STAGES = 8


@dataclass(frozen=True)
class WideTiling:
    """How csrc/wide_products.cu is cut.

    Attributes:
        tokens, at_once: of a thread block, and of one instruction.
        row_tiles: of 128 rows, of a thread block.
        depth: blocks of weights that are read ahead.
        splits: thread blocks that share the columns.
        sharers: thread blocks that copy activations for each other.
        thread_blocks: that share a multiprocessor.
    """

    tokens: int
    at_once: int
    row_tiles: int = 1
    depth: int = 2
    splits: int = 1
    sharers: int = 1
    thread_blocks: int = 1

    @property
    def rows(self) -> int:
        """Of a thread block."""
        return self.row_tiles * ROWS

    @property
    def stages(self) -> int:
        """Blocks of activations in shared memory: as many as there is room for."""
        room = SHARED_BYTES // self.thread_blocks - (self.thread_blocks > 1) * 1024
        return min(MOST_STAGES, (room - 16 * MOST_STAGES) // (self.tokens * BLOCK * 2))

    @property
    def barriers_at(self) -> int:
        """Where in shared memory they are: behind stages, sums and results."""
        result = self.tokens * (self.rows + 4) * 4
        if self.splits == 1:
            result = self.tokens * (self.rows * 2 + 16)
        return max(self.stages * self.tokens * BLOCK * 2, result)


@functools.cache
def can_multiply_wide(device_index: int) -> bool:
    """Whether a card is a Hopper."""
    return torch.cuda.get_device_capability(device_index) == CAPABILITY


def multiply_wide(x: Activations, weight: CudaTensor, tiling: WideTiling) -> Tensor:
    """[num_tokens, rows] bfloat16 of activations in the order that it takes."""
    rows = weight.shape[0]
    out = torch.empty(x.num_tokens, rows, dtype=torch.bfloat16, device=x.device)
    _launch(x, weight, out, 0, -(-rows // tiling.rows), tiling)
    return out


def _launch(
    x: Activations,
    weight: CudaTensor,
    out: Tensor,
    first_row_block: int,
    row_blocks: int,
    tiling: WideTiling,
) -> None:
    """Multiply some blocks of rows."""
    planes, format = weight.planes, weight.format
    row_groups = -(-row_blocks // tiling.sharers)
    token_tiles = -(-x.num_tokens // tiling.tokens)
    _load(format.name, tiling, x.device.index)(
        (tiling.splits, tiling.sharers * row_groups * token_tiles),
        WARPS * LANES,
        (
            *(planes.get(name) for name in ("codes", "high", "scales", "mins")),
            *(x.wide, out, Long(num_blocks(weight.shape[1])), weight.shape[0]),
            *(first_row_block, row_blocks, x.num_tokens),
            *(*find_level_bytes(format.name), tiling.barriers_at),
        ),
        shared_bytes=tiling.barriers_at + 16 * tiling.stages,
    )


@functools.cache
def find_level_bytes(format_name: str) -> tuple[Words, Words]:
    """Low and high bytes of a table's levels in bfloat16; zeros in formats without a table."""
    words = Words(), Words()
    format = FORMATS[format_name]
    if find_kind(format) == 1:
        codes = torch.arange(2**format.code_bits, dtype=torch.uint8)[:, None]
        levels = decode(codes, None, None, format).flatten().bfloat16().view(torch.int16).tolist()
        for place, half in enumerate(words):
            found = bytes(level >> (8 * place) & 0xFF for level in levels).ljust(16, b"\0")
            for index in range(4):
                half.words[index] = int.from_bytes(found[4 * index : 4 * index + 4], "little")
    return words


@functools.cache
def _load(format_name: str, tiling: WideTiling, device_index: int) -> Kernel:
    return load_kernel(SOURCE, "multiply_wide", make_defines(format_name, tiling), device_index)


def make_defines(format_name: str, tiling: WideTiling) -> tuple[tuple[str, str], ...]:
    """What csrc/wide_products.cu is told."""
    return write_defines(
        {
            **describe_format(FORMATS[format_name]),
            "TILE_TOKENS": tiling.tokens,
            "AT_ONCE": tiling.at_once,
            "ROW_TILES": tiling.row_tiles,
            "DEPTH": tiling.depth,
            "STAGES": tiling.stages,
            "SPLITS": tiling.splits,
            "SHARERS": tiling.sharers,
            "THREAD_BLOCKS": tiling.thread_blocks,
        }
    )

"""Products of a low-bit weight with a batch of tokens, by csrc/batch_products.cu. Ranks on CUDA.

Activations come through shared memory, where eight tiles of rows use them. For cards from Hopper
on, whose thread blocks share their sums in clusters.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.kernels.cuda.activations import Activations
from autotp_serving.kernels.cuda.nvrtc import Argument, Kernel, load_kernel
from autotp_serving.kernels.cuda.tiles import ROWS, CudaTensor
from autotp_serving.kernels.cuda.weights import (
    LANES,
    TOKENS,
    describe_format,
    find_kind,
    list_arguments,
    write_defines,
)
from autotp_serving.low_bit.formats import BLOCK, FORMATS, Format, num_blocks

SOURCE = "batch_products.cu"
WARPS = 8
BLOCK_ROWS = WARPS * ROWS
SUMS_STRIDE = BLOCK_ROWS + 4
LEAST_CAPABILITY = (9, 0)
ENOUGH_THREAD_BLOCKS = 1.9
"""For a multiprocessor, to keep it busy; two or three run at a time."""

FEWEST_BLOCKS = 8
"""Blocks of columns that a thread block takes at least."""


@dataclass(frozen=True)
class BatchTiling:
    """How it is cut: tiles of 8 tokens of a thread block, thread blocks that share the columns,
    blocks of columns in shared memory, those multiplied at a time, and thread blocks that share a
    multiprocessor.
    """

    token_tiles: int
    splits: int
    stages: int
    step: int
    thread_blocks: int


@functools.cache
def can_batch(device_index: int) -> bool:
    """Whether a card has clusters of thread blocks."""
    return torch.cuda.get_device_capability(device_index) >= LEAST_CAPABILITY


@functools.cache
def choose_batch_tiling(num_tokens: int, rows: int, columns: int, device_index: int) -> BatchTiling:
    """The fastest by benchmarks/gpu_products.py on an H200, or near it."""
    row_blocks = -(-rows // BLOCK_ROWS)
    processors = torch.cuda.get_device_properties(device_index).multi_processor_count
    token_tiles = next((n for n in (4, 8) if n * TOKENS >= num_tokens), 16)
    while token_tiles > 4 and _count(row_blocks, num_tokens, token_tiles) < 0.9 * processors:
        token_tiles //= 2
    thread_blocks, splits = _count(row_blocks, num_tokens, token_tiles), 1
    while (
        splits < 8
        and thread_blocks * splits < processors * ENOUGH_THREAD_BLOCKS
        and num_blocks(columns) >= splits * 2 * FEWEST_BLOCKS
    ):
        splits *= 2
    return tile_batch(token_tiles, splits)


def _count(row_blocks: int, num_tokens: int, token_tiles: int) -> int:
    return row_blocks * -(-num_tokens // (token_tiles * TOKENS))


def tile_batch(token_tiles: int, splits: int) -> BatchTiling:
    """As much of everything as a multiprocessor has room for."""
    return BatchTiling(token_tiles, splits, 4, 1, 3 if token_tiles <= 8 else 2)


def multiply_batch(x: Activations, weight: CudaTensor, tiling: BatchTiling | None = None) -> Tensor:
    """[num_tokens, rows] bfloat16 of activations rounded as for a few tokens; rows are even."""
    rows, columns = weight.shape
    tiling = tiling or choose_batch_tiling(x.num_tokens, rows, columns, x.device.index)
    out = torch.empty(x.num_tokens, rows, dtype=torch.bfloat16, device=x.device)
    token_blocks = -(-x.num_tokens // (tiling.token_tiles * TOKENS))
    arguments = (*list_arguments(x, weight, out, rows), None, None, 1)
    launch(weight.format, rows, token_blocks, arguments, tiling, x.device.index)
    return out


def launch(
    format: Format,
    rows: int,
    token_blocks: int,
    arguments: tuple[Argument, ...],
    tiling: BatchTiling,
    device_index: int,
    is_grouped: bool = False,
) -> None:
    """Start the kernel for `rows` of one weight, or of each expert's."""
    _kernel(format.name, tiling, device_index, is_grouped)(
        (tiling.splits, -(-rows // BLOCK_ROWS), token_blocks),
        WARPS * LANES,
        arguments,
        shared_bytes=count_shared_bytes(format, tiling),
    )


def count_shared_bytes(format: Format, tiling: BatchTiling) -> int:
    """Shared memory of a thread block; see kStageBytes of the source."""
    macros = describe_format(format)
    has_mins = format.kind == "asymmetric"
    tile = ROWS * (BLOCK * format.code_bits // 8 + int(str(macros["SCALE_BYTES"])) + 2 * has_mins)
    tokens = tiling.token_tiles * TOKENS
    of_token = BLOCK * 2 if find_kind(format) == 2 else BLOCK + 4
    stage = WARPS * tile + tokens * (of_token + 4 * has_mins)
    return max(tiling.stages * stage, tokens * SUMS_STRIDE * 4)


@functools.cache
def _kernel(format_name: str, tiling: BatchTiling, device_index: int, is_grouped: bool) -> Kernel:
    return load_kernel(
        SOURCE, "multiply_batch", make_defines(format_name, tiling, is_grouped), device_index
    )


def make_defines(
    format_name: str, tiling: BatchTiling, is_grouped: bool = False
) -> tuple[tuple[str, str], ...]:
    """What csrc/batch_products.cu is told."""
    return write_defines(
        {
            **describe_format(FORMATS[format_name]),
            "GROUPED": "true" if is_grouped else "false",
            "TOKEN_TILES": tiling.token_tiles,
            "SPLITS": tiling.splits,
            "STAGES": tiling.stages,
            "STEP": tiling.step,
            "THREAD_BLOCKS": tiling.thread_blocks,
        }
    )

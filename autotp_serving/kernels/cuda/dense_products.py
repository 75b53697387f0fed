"""Products of a bfloat16 weight with many tokens, by csrc/dense_products.cu. Ranks on CUDA.

For Hopper. Unlike cuBLAS it does with gate's and up's sums what comes after them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.kernels.cuda.nvrtc import Kernel, describe_matrix, load_kernel
from autotp_serving.kernels.cuda.weights import write_defines
from autotp_serving.low_bit.formats import BLOCK

SOURCE = "dense_products.cu"
CAPABILITY = (9, 0)
CLUSTER = 2
TOKENS = 128
"""Of a thread block."""

THREADS = 384
STAGING_BYTES = 8 * 16 * 80


@dataclass(frozen=True)
class DenseTiling:
    """How csrc/dense_products.cu is cut.

    Attributes:
        rows: of the weight, of a thread block.
        stages: blocks of columns that are copied ahead.
    """

    rows: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory, with what aligning takes."""
        stage = (TOKENS + self.rows) * BLOCK * 2
        return 1024 + self.stages * (stage + 16) + STAGING_BYTES


TILINGS = (DenseTiling(256, 4), DenseTiling(192, 5))


def multiply_dense(
    x: Tensor, weight: Tensor, is_gated: bool = False, tiling: DenseTiling = TILINGS[0]
) -> Tensor:
    """x [num_tokens, columns] times weight [rows, columns] transposed, all bfloat16.

    Args:
        is_gated: the weight has gate's rows and then up's; the result is silu(gate) * up.

    Returns:
        [num_tokens, rows], or half of them if gated.
    """
    num_tokens, columns = x.shape
    rows = weight.shape[0] // 2 if is_gated else weight.shape[0]
    out = torch.empty(num_tokens, rows, dtype=torch.bfloat16, device=x.device)
    kernel = _load(tiling, is_gated, x.device.index)
    tile_rows = tiling.rows // 2 if is_gated else tiling.rows
    tiles = -(-num_tokens // (CLUSTER * TOKENS)) * -(-rows // tile_rows)
    clusters = min(tiles, _count_clusters(tiling, is_gated, x.device.index))
    kernel(
        (clusters * CLUSTER,),
        THREADS,
        (
            describe_matrix(x.data_ptr(), num_tokens, columns, TOKENS),
            describe_matrix(weight.data_ptr(), weight.shape[0], columns, tiling.rows // 2),
            *(out, -(-columns // BLOCK), rows, num_tokens),
        ),
        shared_bytes=tiling.shared_bytes,
    )
    return out


@functools.cache
def _count_clusters(tiling: DenseTiling, is_gated: bool, device_index: int) -> int:
    kernel = _load(tiling, is_gated, device_index)
    return kernel.count_clusters(CLUSTER, THREADS, tiling.shared_bytes)


@functools.cache
def _load(tiling: DenseTiling, is_gated: bool, device_index: int) -> Kernel:
    return load_kernel(SOURCE, "multiply_dense", make_defines(tiling, is_gated), device_index)


def make_defines(tiling: DenseTiling, is_gated: bool) -> tuple[tuple[str, str], ...]:
    """What csrc/dense_products.cu is told."""
    gated = "true" if is_gated else "false"
    return write_defines({"ROWS": tiling.rows, "STAGES": tiling.stages, "GATED": gated})

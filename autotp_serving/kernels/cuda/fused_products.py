"""Products of few tokens together with what follows them. Ranks on CUDA, from Hopper on.

By csrc/fused_products.cu: rotation, or the gated activation, in the launch of the product. Results
are those of the separate kernels (products.py, activations.py) to the bit.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from autotp_serving.kernels.cuda.activations import Activations, HeadsEnd, Rotation
from autotp_serving.kernels.cuda.nvrtc import (
    OVERLAP_CAPABILITY,
    Argument,
    Kernel,
    load_kernel,
)
from autotp_serving.kernels.cuda.products import (
    choose_tiling,
    count_staged_bytes,
    rounding_of,
)
from autotp_serving.kernels.cuda.tiles import ROWS, CudaTensor
from autotp_serving.kernels.cuda.weights import (
    LANES,
    describe_format,
    find_format_name,
    list_arguments,
    write_defines,
)
from autotp_serving.low_bit.formats import BLOCK, FORMATS

SOURCE = "fused_products.cu"
MOST_FUSED = 8
"""Tokens that these kernels take, a tile."""

ROTATED_FORMATS = (None, "sym_int4", "asym_int4")
GATED_FORMATS = (None, "asym_int4")
"""Formats (None: bfloat16) in which it is quicker, by benchmarks/gpu_step.py on an H200."""

ROTATES, GATES = 1, 2


@functools.cache
def can_fuse(device_index: int) -> bool:
    """Whether the card has clusters and kernels that begin early."""
    return torch.cuda.get_device_capability(device_index) >= OVERLAP_CAPABILITY


def can_rotate(weight: CudaTensor | Tensor, num_tokens: int, rotation: Rotation) -> bool:
    """Whether `multiply_heads` takes a layer, whose heads may have no norms, and is quicker."""
    return (
        rotation.query_norm is None
        and rotation.cos.shape[1] % (2 * ROWS) == 0
        and find_format_name(weight) in ROTATED_FORMATS
        and _takes(weight, num_tokens)
    )


def can_gate(weight: CudaTensor | Tensor, num_tokens: int) -> bool:
    """Whether `multiply_gated` takes a product of gate and up, and is quicker."""
    return (
        weight.shape[0] % (2 * BLOCK) == 0
        and find_format_name(weight) in GATED_FORMATS
        and _takes(weight, num_tokens)
    )


def _takes(weight: CudaTensor | Tensor, num_tokens: int) -> bool:
    return (
        num_tokens <= MOST_FUSED and weight.shape[1] % BLOCK == 0 and can_fuse(weight.device.index)
    )


def multiply_heads(x: Activations, weight: CudaTensor | Tensor, end: HeadsEnd) -> Tensor:
    """Queries, keys and values, ended as `rotate_and_store` does: [num_tokens, rows] bfloat16."""
    out = torch.empty(x.num_tokens, weight.shape[0], dtype=torch.bfloat16, device=weight.device)
    rotation, (keys, values) = end.rotation, end.pools or (None, None)
    ending = (
        *(rotation.bias, end.positions, rotation.cos, rotation.sin, end.slots, keys, values),
        *(end.num_heads, end.num_kv_heads, rotation.cos.shape[1], None, None, None),
    )
    _launch(x, weight, out, ending, ROTATES)
    return out


def multiply_gated(x: Activations, weight: CudaTensor | Tensor, bias: Tensor | None) -> Activations:
    """silu(gate) * up [num_tokens, rows / 2], rounded as the next product of the format takes it.

    Args:
        weight: gate's rows, then up's.
        bias: [rows] or None.
    """
    rounding = rounding_of(None if isinstance(weight, Tensor) else weight.format, 1)
    out = Activations.empty(x.num_tokens, weight.shape[0] // 2, rounding, weight.device)
    ending = (bias, *[None] * 6, 0, 0, 0, out.codes, out.scales, out.sums)
    _launch(x, weight, out.plain, ending, GATES)
    return out


def _launch(
    x: Activations,
    weight: CudaTensor | Tensor,
    out: Tensor | None,
    ending: tuple[Argument, ...],
    after: int,
) -> None:
    rows = weight.shape[0]
    format_name = find_format_name(weight)
    # As many warps as without, for sums of the same order.
    tiling = choose_tiling(x.num_tokens, rows, format_name)
    staged_bytes = count_staged_bytes(x, format_name, tiling)
    _kernel(format_name, tiling.warps, after, staged_bytes > 0, x.device.index)(
        (rows // (2 * ROWS),),
        tiling.warps * LANES,
        (*list_arguments(x, weight, out, rows), *ending),
        shared_bytes=staged_bytes,
    )


def make_defines(
    format_name: str | None, warps: int, after: int, is_staged: bool
) -> tuple[tuple[str, str], ...]:
    """What csrc/fused_products.cu is told."""
    format = None if format_name is None else FORMATS[format_name]
    staged = "true" if is_staged else "false"
    return write_defines(
        {**describe_format(format), "WARPS": warps, "AFTER": after, "STAGED": staged}
    )


@functools.cache
def _kernel(
    format_name: str | None, warps: int, after: int, is_staged: bool, device_index: int
) -> Kernel:
    defines = make_defines(format_name, warps, after, is_staged)
    return load_kernel(SOURCE, "multiply_fused", defines, device_index)

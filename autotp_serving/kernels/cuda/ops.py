"""The products as operators of torch, so that `torch.compile` and graphs take them. Ranks on CUDA.

A compiled model sees one operator with a known result, and never the launch inside it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from autotp_serving.kernels.cuda.products import multiply
from autotp_serving.kernels.cuda.tiles import CudaTensor
from autotp_serving.low_bit.formats import find_format

NAMESPACE = "autotp"
LINEAR = (
    "low_bit_linear(Tensor x, Tensor codes, Tensor? high, Tensor? scales, Tensor? mins, "
    "str format, int rows, int columns) -> Tensor"
)


@functools.cache
def register_ops() -> torch.library.Library:
    """Make `torch.ops.autotp.low_bit_linear` known; what is returned must be kept."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(LINEAR)
    library.impl("low_bit_linear", _low_bit_linear, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::low_bit_linear", _shape_of_result, lib=library)
    return library


def low_bit_linear(x: Tensor, weight: CudaTensor) -> Tensor:
    """`multiply` by way of the operator, which must have been registered."""
    planes = weight.planes
    return torch.ops.autotp.low_bit_linear(
        x,
        planes["codes"],
        planes.get("high"),
        planes.get("scales"),
        planes.get("mins"),
        weight.format.name,
        *weight.shape,
    )


def _low_bit_linear(
    x: Tensor,
    codes: Tensor,
    high: Tensor | None,
    scales: Tensor | None,
    mins: Tensor | None,
    format: str,
    rows: int,
    columns: int,
) -> Tensor:
    named = {"codes": codes, "high": high, "scales": scales, "mins": mins}
    planes = {name: plane for name, plane in named.items() if plane is not None}
    found = find_format(format)
    assert found is not None
    return multiply(x, CudaTensor(found, (rows, columns), planes))


def _shape_of_result(
    x: Tensor,
    codes: Tensor,
    high: Tensor | None,
    scales: Tensor | None,
    mins: Tensor | None,
    format: str,
    rows: int,
    columns: int,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)

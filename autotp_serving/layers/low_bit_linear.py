"""A linear layer whose weight stays low-bit. Runs on every rank, each with its own shard.

Takes the place of DeepSpeed AutoTP's `LinearLayer` (split by rows, no reduction) and
`LinearAllreduce` (split by columns, partial sums reduced over the ranks).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from autotp_serving.kernels.cpu.linear import CpuMatmul, load_library
from autotp_serving.kernels.cpu.tiles import tile as tile_weight
from autotp_serving.layers.adapters import Adapt
from autotp_serving.low_bit.tensor import LowBitTensor, dequantize

# Multiplies `x` [tokens, cols] by transposed weights [rows, cols] into [tokens, rows of all].
Matmul = Callable[[Tensor], Tensor]

# Weights dequantized at once. On CPU a tile of 16-bit numbers then fits in half an L2 cache of
# 1 MiB; on an accelerator it is 32 MiB, enough rows to keep a matrix multiplication busy.
CPU_TILE = 2**18
ACCELERATOR_TILE = 2**24


class LowBitLinear(nn.Module):
    """`reduce(x @ weight.T) + bias` with a low-bit weight `[out_features, in_features]`.

    `bias` `[out_features]` or None; with `reduce` it is whole on every rank, since it is added
    once, after the all-reduce. `reduce` takes and returns a tensor of the output's shape and may
    work in place; `adapt`, where there are adapters, adds to the product before. The planes are
    buffers under their own names (`codes`, `scales`, ...); `weight` is the same memory as one
    LowBitTensor.
    """

    def __init__(
        self,
        weight: LowBitTensor,
        bias: Tensor | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight = arrange(weight)
        for name, plane in weight.planes.items():
            self.register_buffer(name, plane)
        self.register_buffer("bias", bias)
        self.reduce = reduce
        self.adapt: Adapt | None = None
        self.weight = weight
        self.matmul = make_matmul(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        out = self.matmul(x if x.dim() == 2 else x.reshape(-1, self.in_features))
        if self.adapt is not None:
            self.adapt(x, out)
        out = self.finish(out)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], self.out_features)

    def finish(self, out: Tensor) -> Tensor:
        """All-reduce the product and add the bias, both in place, where there are any."""
        if self.reduce is not None:
            out = self.reduce(out)
        return out if self.bias is None else out.add_(self.bias)

    def set_weight(self, weight: LowBitTensor) -> None:
        """Let an equal weight, arranged for its kernel, take this one's place: a view, say."""
        self.weight = weight
        self.matmul = make_matmul(weight)
        for name, plane in weight.planes.items():
            setattr(self, name, plane)

    def extra_repr(self) -> str:
        """What `print(model)` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"low_bit={self.weight.format.name}, bias={self.bias is not None}, "
            f"reduce={self.reduce is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Follow `.to(device)`, but keep the planes as they are under `.half()` or `.to(dtype)`."""
        super()._apply(fn, recurse)
        device = self.codes.device
        if device != self.weight.device:
            self.weight = arrange(self.weight.to(device))
            self.matmul = make_matmul(self.weight)
        for name, plane in self.weight.planes.items():
            setattr(self, name, plane)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """What is saved has the order of formats.py, whatever the kernel's."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, plane in self.weight.canonical().planes.items():
            destination[prefix + name] = plane


class Products(Protocol):
    """Who multiplies by low-bit weights on one kind of device."""

    def arrange(self, weight: LowBitTensor) -> LowBitTensor:
        """A weight with its bytes in the order that `matmul` reads; a copy if any."""
        ...

    def matmul(self, *weights: LowBitTensor) -> Matmul:
        """The fastest way to multiply by arranged weights of one format and as many columns."""
        ...


class ReferenceProducts:
    """Portable torch, on any device."""

    def arrange(self, weight: LowBitTensor) -> LowBitTensor:
        """See Products."""
        return weight

    def matmul(self, *weights: LowBitTensor) -> Matmul:
        """See Products."""
        if len(weights) == 1:
            return functools.partial(portable_matmul, weight=weights[0])
        return lambda x: torch.cat([portable_matmul(x, weight) for weight in weights], 1)


class CpuProducts(ReferenceProducts):
    """Compiled kernels, for the formats that compile here."""

    def arrange(self, weight: LowBitTensor) -> LowBitTensor:
        """See Products."""
        return weight if load_library(weight.format) is None else tile_weight(weight)

    def matmul(self, *weights: LowBitTensor) -> Matmul:
        """See Products."""
        library = load_library(weights[0].format)
        return super().matmul(*weights) if library is None else CpuMatmul(library, *weights)


class CudaProducts(ReferenceProducts):
    """Kernels compiled by NVRTC, on cards that they are for."""

    def __init__(self, device: torch.device) -> None:
        from autotp_serving.kernels.cuda import products

        self._has_kernels = products.can_multiply(device.index or 0)

    def arrange(self, weight: LowBitTensor) -> LowBitTensor:
        """See Products."""
        from autotp_serving.kernels.cuda import tiles

        return tiles.tile(weight) if self._has_kernels else weight

    def matmul(self, *weights: LowBitTensor) -> Matmul:
        """See Products."""
        if not self._has_kernels or len(weights) > 1:
            return super().matmul(*weights)
        from autotp_serving.kernels.cuda import ops

        ops.register_ops()
        return functools.partial(ops.low_bit_linear, weight=weights[0])


def choose_products(device: torch.device) -> Products:
    """The device's kernels, or the reference."""
    kinds = {"cpu": CpuProducts, "cuda": functools.partial(CudaProducts, device)}
    return kinds.get(device.type, ReferenceProducts)()


def make_matmul(*weights: LowBitTensor) -> Matmul:
    """The fastest way to multiply by weights of one format and as many columns, where they are."""
    return choose_products(weights[0].device).matmul(*weights)


def arrange(weight: LowBitTensor) -> LowBitTensor:
    """A weight with its bytes in the order that `make_matmul`'s choice reads; a copy if any."""
    return choose_products(weight.device).arrange(weight)


def portable_matmul(x: Tensor, weight: LowBitTensor, *, tile: int | None = None) -> Tensor:
    """Multiply `x` `[tokens, cols]` by `weight` `[rows, cols]` transposed: `[tokens, rows]`.

    Dequantizes `tile` weights at a time into the dtype of `x`, multiplies and forgets them.
    """
    rows, cols = weight.shape
    tile = tile or (CPU_TILE if x.is_cpu else ACCELERATOR_TILE)
    step = max(1, tile // cols)
    out = x.new_empty(x.shape[0], rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        part = dequantize(weight.slice_rows(start, stop), x.dtype)
        out[:, start:stop] = functional.linear(x, part)
    return out

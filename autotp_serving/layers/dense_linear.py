"""Linear layers whose weight stays dense, once it is loaded. Every rank.

They take the place of AutoTP's, so that dense and low-bit layers multiply and sum in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autotp_serving.kernels.cpu.dense import (
    DenseMatmul,
    has_kernel,
    load_dense_library,
    place,
    sums_like_torch,
)
from autotp_serving.layers.adapters import Adapt
from autotp_serving.layers.head import VocabParallelHead
from autotp_serving.low_bit.selection import COLUMN_PARALLEL, ROW_PARALLEL

logger = logging.getLogger(__name__)

AllReduce = Callable[[Tensor], Tensor]


class DenseLinear(nn.Module):
    """`reduce(x @ weight.T) + bias` with a dense weight.

    Args:
        weight: [out_features, in_features], this rank's.
        bias: [out_features] or None; with `reduce` it is whole on every rank.
        reduce: sums a product over the ranks in place, or None.
        matmul: multiplies [tokens, in_features] by the weight, or None for torch.

    Attributes:
        adapt: adds to the product, before the sum over the ranks, what adapters make of the input.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        reduce: AllReduce | None,
        matmul: DenseMatmul | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.bias = bias
        self.reduce = reduce
        self.adapt: Adapt | None = None
        self.matmul = matmul

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features], equal on all ranks if it reduces."""
        if self.matmul is None:
            out = functional.linear(x, self.weight)
        else:
            out = self.matmul(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)
        if self.adapt is not None:
            self.adapt(x, out)
        return self.finish(out)

    def finish(self, out: Tensor) -> Tensor:
        """All-reduce the product and add the bias, both in place, where there are any."""
        if self.reduce is not None:
            out = self.reduce(out)
        return out if self.bias is None else out.add_(self.bias)


class DenseKernels:
    """Makes the CPU kernel's products of weights, for shapes on which it agrees with torch."""

    def __init__(self) -> None:
        self._agrees: dict[tuple[int, ...], bool] = {}

    def make_matmul(self, weight: Tensor) -> DenseMatmul | None:
        """The product of a weight [rows, cols], or None where torch is to multiply."""
        if not weight.is_cpu or not has_kernel(weight.dtype) or weight.stride(1) != 1:
            return None
        library = load_dense_library()
        if library is None or not weight.numel():
            return None
        matmul = DenseMatmul(library, weight)
        shape = tuple(weight.shape)
        if shape not in self._agrees:
            self._agrees[shape] = sums_like_torch(matmul)
            if not self._agrees[shape]:
                logger.info("Weights %s are multiplied by torch, which sums otherwise here", shape)
        return matmul if self._agrees[shape] else None

    def take_over(
        self, weight: nn.Parameter, is_shared: bool = False
    ) -> tuple[nn.Parameter, DenseMatmul | None]:
        """A weight where it is read quickest, unless others share its memory, and its product."""
        matmul = self.make_matmul(weight)
        if matmul is None or is_shared:
            return weight, matmul
        weight = nn.Parameter(place(weight), requires_grad=False)
        return weight, self.make_matmul(weight)


def join_dense(linears: Sequence[nn.Module]) -> DenseMatmul | None:
    """One product of layers that share their input, or None where a kernel does not multiply all.

    All of them have a bias, or none.
    """
    for linear in linears:
        if not isinstance(linear, DenseLinear) or linear.matmul is None or linear.reduce:
            return None
    if len({linear.bias is None for linear in linears}) != 1:
        return None
    return DenseMatmul(load_dense_library(), *(linear.weight for linear in linears))


@torch.no_grad()
def take_over_linears(model: nn.Module, all_reduce: AllReduce) -> None:
    """Replace AutoTP's layers that sum, and all dense ones that a kernel multiplies.

    Once the weights are loaded; those that a kernel reads are copied, one at a time, to where
    that is quickest, but for a head tied to the embedding.
    """
    kernels = DenseKernels()
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if isinstance(module, VocabParallelHead):
            if module.low_bit is None:
                module.weight, module.matmul = kernels.take_over(module.weight, module.is_tied)
        elif kind in COLUMN_PARALLEL + ROW_PARALLEL and not getattr(module, "gather_output", False):
            weight, matmul = kernels.take_over(module.weight)
            reduces = kind in ROW_PARALLEL and module.mp_group is not None
            if matmul is not None or reduces:
                reduce = all_reduce if reduces else None
                model.set_submodule(name, DenseLinear(weight, module.bias, reduce, matmul))

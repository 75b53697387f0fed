"""Linear layers on a CUDA card as products, joined where they share their input. Ranks on CUDA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autotp_serving.kernels.cuda.activations import Activations, Rounding
from autotp_serving.kernels.cuda.products import multiply_activations, rounding_of
from autotp_serving.kernels.cuda.tiles import ROWS, CudaTensor, join_tiles
from autotp_serving.layers.low_bit_linear import LowBitLinear
from autotp_serving.low_bit.formats import BLOCK, Format


class UnfitLayer(Exception):
    """A layer that these kernels do not take; says in a few words why."""


@dataclass(frozen=True)
class Product:
    """A linear layer, or several that share their input.

    Attributes:
        weight: [rows, columns], low-bit or bfloat16.
        bias: [rows], added by whoever takes the result, or None.
    """

    weight: CudaTensor | Tensor
    bias: Tensor | None

    @property
    def format(self) -> Format | None:
        """Of its weight; None: bfloat16."""
        return None if isinstance(self.weight, Tensor) else self.weight.format

    def rounding(self, num_tokens: int) -> Rounding:
        """What activations it takes."""
        return rounding_of(self.format, num_tokens)

    def __call__(self, x: Activations) -> Tensor:
        """[num_tokens, rows], without the bias."""
        return multiply_activations(x, self.weight)


def join_linears(*linears: nn.Module) -> Product:
    """One product of linear layers, which from then on hold views of its weight.

    Raises:
        UnfitLayer: they cannot be joined.
    """
    biases = [linear.bias for linear in linears]
    if len({bias is None for bias in biases}) != 1:
        raise UnfitLayer("some of its projections have a bias")
    bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
    if all(isinstance(linear, LowBitLinear) for linear in linears):
        weights = [linear.weight for linear in linears]
        if len({weight.format for weight in weights}) != 1:
            raise UnfitLayer("its projections differ in format")
        if not all(isinstance(weight, CudaTensor) for weight in weights):
            raise UnfitLayer("the kernels of its format cannot be used here")
        rows, columns = [weight.shape[0] for weight in weights], weights[0].shape[1]
        if columns % BLOCK or any(count % ROWS for count in rows[:-1]):
            raise UnfitLayer(f"sizes {rows} x {columns} do not fit tiles")
        joined = weights[0] if len(weights) == 1 else join_tiles(weights)
        start = 0
        for linear, count in zip(linears, rows, strict=True):
            linear.set_weight(joined.slice_tiles(start, start + count))
            start += count
        return Product(joined, bias)
    dense = [linear.weight for linear in linears]
    if not all(isinstance(w, Tensor) and w.dtype == torch.bfloat16 and w.dim() == 2 for w in dense):
        raise UnfitLayer("its weights are neither low-bit nor bfloat16")
    joined = dense[0].detach().contiguous() if len(dense) == 1 else torch.cat(dense).detach()
    start = 0
    for linear in linears:
        count = linear.weight.shape[0]
        linear.weight = nn.Parameter(joined[start : start + count], requires_grad=False)
        start += count
    return Product(joined, bias)

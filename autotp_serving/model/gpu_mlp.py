"""What stands between two norms of a layer on a CUDA card: a gated MLP, or many of them as experts.

Ranks on CUDA. See gpu_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotp_serving.kernels.cuda.activations import (
    Activations,
    Rounding,
    quantize_tokens,
    silu_multiply,
)
from autotp_serving.kernels.cuda.experts import MOST_EXPERTS, group_pairs, multiply_experts
from autotp_serving.kernels.cuda.fused_products import can_gate, multiply_gated
from autotp_serving.kernels.cuda.products import rounding_of
from autotp_serving.kernels.cuda.tiles import ROWS
from autotp_serving.layers.unfuse import AbsentExpert
from autotp_serving.low_bit.formats import BLOCK
from autotp_serving.model.gpu_products import Product, UnfitLayer, join_linears

MakeInput = Callable[[Rounding], Activations]
"""Norms a layer's hidden state as a product takes it."""

MIXTURE_FAMILIES = ("mixtral", "qwen3_moe")
"""Whose router is a module that gives logits, weights and numbers of experts, and nothing else of
whose layers differs from Llama's."""


@dataclass(frozen=True)
class GatedMlp:
    """down(silu(gate) * up)."""

    gate_up: Product
    down: Product

    @staticmethod
    def of(mlp: Any) -> GatedMlp:
        """Read it from transformers' module, whose weights are joined.

        Raises:
            UnfitLayer: the kernels do not take it.
        """
        gate_up = join_linears(mlp.gate_proj, mlp.up_proj)
        size = gate_up.weight.shape[0] // 2
        if size % BLOCK:
            raise UnfitLayer(f"its MLP of {size} is no multiple of {BLOCK}")
        return GatedMlp(gate_up, join_linears(mlp.down_proj))

    @property
    def bias(self) -> Tensor | None:
        """What is still to be added to the result, once for all ranks."""
        return self.down.bias

    def run(self, make_input: MakeInput, num_tokens: int) -> Tensor:
        """Of what `make_input` gives, [num_tokens, size].

        Returns:
            This rank's part of the sum, without the bias, [num_tokens, size] bfloat16.
        """
        x, bias = make_input(self.gate_up.rounding(num_tokens)), self.gate_up.bias
        rounding = self.down.rounding(num_tokens)
        # Together they round as the first's own format does.
        is_alike = rounding is self.gate_up.rounding(num_tokens)
        if is_alike and can_gate(self.gate_up.weight, num_tokens):
            return self.down(multiply_gated(x, self.gate_up.weight, bias))
        return self.down(silu_multiply(self.gate_up(x), bias, rounding))


@dataclass(frozen=True)
class Mixture:
    """Experts, each a gated MLP, of which a router chooses a few for each token.

    Attributes:
        router: maps [num_tokens, size] to logits, and weights and numbers of the chosen experts
            [num_tokens, experts of one token].
        gate_up, down: of all experts, one after another.
    """

    router: nn.Module
    gate_up: Product
    down: Product
    num_experts: int
    bias: None = None

    @staticmethod
    def of(mixture: Any) -> Mixture:
        """Read it from transformers' module, whose experts' weights are joined.

        Raises:
            UnfitLayer: the kernels do not take it.
        """
        experts = mixture.experts
        if any(isinstance(expert, AbsentExpert) for expert in experts):
            raise UnfitLayer("its experts are dealt out to the ranks")
        if len(experts) > MOST_EXPERTS:
            raise UnfitLayer(f"it has over {MOST_EXPERTS} experts")
        size, rows = experts[0].up_proj.weight.shape[0], experts[0].down_proj.weight.shape[0]
        if size % BLOCK or rows % ROWS:
            raise UnfitLayer(f"its experts of {size} are no multiples of {BLOCK}")
        halves = [half for expert in experts for half in (expert.gate_proj, expert.up_proj)]
        gate_up, down = join_linears(*halves), join_linears(*(e.down_proj for e in experts))
        return Mixture(mixture.gate, gate_up, down, len(experts))

    def run(self, make_input: MakeInput, num_tokens: int) -> Tensor:
        """See GatedMlp."""
        x = make_input(Rounding.NONE)
        _, weights, chosen = self.router(x.plain)
        groups = group_pairs(chosen, self.num_experts)
        x = quantize_tokens(x.plain, rounding_of(self.gate_up.format, 1))
        gate_up = multiply_experts(x, self.gate_up.weight, self.num_experts, groups)
        x = silu_multiply(gate_up, None, rounding_of(self.down.format, 1))
        down = multiply_experts(x, self.down.weight, self.num_experts, groups)
        down = down.view(*chosen.shape, -1)
        return torch.bmm(weights.to(down.dtype)[:, None], down)[:, 0]

"""Llama-like layers on a CUDA card: two pieces around attention, ten launches in all.

Ranks on CUDA. The modules are those that transformers built, AutoTP sharded and the loader filled;
the weights of queries, keys and values, and of gate and up, are joined, and the modules keep views
of the joined ones, so that there is one copy. The pieces are written in kernels of our own rather
than compiled from torch: they take any number of tokens without compiling again, round where
transformers' code rounds, and write 8-bit activations where those are made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotp_serving.kernels.cuda.activations import (
    Activations,
    Rotation,
    Rounding,
    add_rms_norm,
    quantize_tokens,
    rotate_and_store,
    silu_multiply,
)
from autotp_serving.kernels.cuda.products import multiply_activations, rounding_of
from autotp_serving.kernels.cuda.tiles import ROWS, CudaTensor, join_tiles
from autotp_serving.kernels.kv_pools import Pools
from autotp_serving.kernels.triton import attention as triton_attention
from autotp_serving.layers.low_bit_linear import LowBitLinear
from autotp_serving.low_bit.formats import BLOCK
from autotp_serving.model.fused_layers import Norm, find_window
from autotp_serving.model.kv_cache import KVCache
from autotp_serving.model.step_inputs import StepInputs

AllReduce = Callable[[Tensor], Tensor]


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

    def rounding(self, num_tokens: int) -> Rounding:
        """What activations it takes."""
        format = None if isinstance(self.weight, Tensor) else self.weight.format
        return rounding_of(format, num_tokens)

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


@dataclass(frozen=True)
class GpuLayer:
    """One decoder layer.

    Attributes:
        reduce: sums a product that was split by columns over the ranks, in place; None: one rank.
        workspace: of attention.
    """

    input_norm: Norm
    qkv: Product
    rotation: Rotation
    output: Product
    mlp_norm: Norm
    gate_up: Product
    down: Product
    pools: Pools
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    sliding_window: int | None
    reduce: AllReduce | None
    workspace: triton_attention.Workspace

    @staticmethod
    def of(
        layer: nn.Module,
        cache: KVCache,
        rotary: tuple[Tensor, Tensor],
        reduce: AllReduce | None,
        workspace: triton_attention.Workspace,
    ) -> GpuLayer:
        """Read it from a decoder layer of transformers, whose weights are joined.

        Args:
            rotary: cos and sin [longest, head_dim] bfloat16.

        Raises:
            UnfitLayer: the kernels do not take it.
        """
        attention, mlp = layer.self_attn, layer.mlp
        qkv = join_linears(attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up = join_linears(mlp.gate_proj, mlp.up_proj)
        if gate_up.weight.shape[0] // 2 % BLOCK:
            raise UnfitLayer(f"its MLP of {gate_up.weight.shape[0] // 2} is no multiple of {BLOCK}")
        head_dim, pools = attention.head_dim, cache.layer(attention.layer_idx)
        num_kv_heads = pools.keys.shape[1]
        query_norm = key_norm = None
        epsilon = 0.0
        if hasattr(attention, "q_norm"):
            query, key = Norm.of(attention.q_norm), Norm.of(attention.k_norm)
            query_norm, key_norm, epsilon = query.weight, key.weight, query.epsilon
        return GpuLayer(
            input_norm=Norm.of(layer.input_layernorm),
            qkv=qkv,
            rotation=Rotation(*rotary, query_norm, key_norm, epsilon, qkv.bias),
            output=join_linears(attention.o_proj),
            mlp_norm=Norm.of(layer.post_attention_layernorm),
            gate_up=gate_up,
            down=join_linears(mlp.down_proj),
            pools=pools,
            num_heads=qkv.weight.shape[0] // head_dim - 2 * num_kv_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scaling=attention.scaling,
            sliding_window=find_window(attention),
            reduce=reduce,
            workspace=workspace,
        )

    def run(self, hidden: Tensor, added: Tensor | None, inputs: StepInputs) -> Tensor:
        """Run the step's tokens through the layer.

        Args:
            hidden: [num_tokens, size] bfloat16, altered.
            added: what is still to be added to it, or None.

        Returns:
            What is to be added to it next.
        """
        attended = self._attend(self._make_heads(hidden, added, inputs), inputs)
        return self._finish(hidden, attended)

    def _make_heads(self, hidden: Tensor, added: Tensor | None, inputs: StepInputs) -> Tensor:
        """[num_tokens, all heads, head_dim]: queries, rotated; keys and values are in the cache."""
        rounding = self.qkv.rounding(len(hidden))
        x = add_rms_norm(hidden, added, self.input_norm.weight, self.input_norm.epsilon, rounding)
        qkv = self.qkv(x)
        pools = self.pools
        is_plain = pools.key_scales is None
        rotate_and_store(
            qkv,
            self.rotation,
            inputs.positions,
            self.num_heads,
            self.num_kv_heads,
            inputs.slots if is_plain else None,
            (pools.keys, pools.values) if is_plain else None,
        )
        qkv = qkv.view(len(qkv), -1, self.head_dim)
        if not is_plain:
            key = qkv[:, self.num_heads : self.num_heads + self.num_kv_heads]
            value = qkv[:, self.num_heads + self.num_kv_heads :]
            triton_attention.store(key, value, inputs.slots, pools)
        return qkv

    def _attend(self, qkv: Tensor, inputs: StepInputs) -> Tensor:
        """[num_tokens, num_heads * head_dim]."""
        query = qkv[:, : self.num_heads]
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        attend = triton_attention.decode if inputs.is_decode else triton_attention.prefill
        attend(
            query,
            self.pools,
            inputs,
            self.scaling,
            self.sliding_window,
            None,
            None,
            out,
            self.workspace,
        )
        return out.view(len(out), -1)

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Everything after attention."""
        num_tokens = len(hidden)
        x = quantize_tokens(attended, self.output.rounding(num_tokens))
        added = self._sum(self.output(x), self.output.bias)
        rounding = self.gate_up.rounding(num_tokens)
        x = add_rms_norm(hidden, added, self.mlp_norm.weight, self.mlp_norm.epsilon, rounding)
        gate_up = self.gate_up(x)
        x = silu_multiply(gate_up, self.gate_up.bias, self.down.rounding(num_tokens))
        return self._sum(self.down(x), self.down.bias)

    def _sum(self, out: Tensor, bias: Tensor | None) -> Tensor:
        if self.reduce is not None:
            out = self.reduce(out)
        return out if bias is None else out.add_(bias)


def check_sizes(model: Any, head_dim: int, longest_rotary: Tensor) -> None:
    """Refuse sizes that the kernels' vectors do not divide.

    Raises:
        UnfitLayer: with the size.
    """
    if longest_rotary.shape[-1] != head_dim:  # Phi-3 may rotate a part of a head only
        raise UnfitLayer("it rotates a part of each head")
    if head_dim % 4 or head_dim > 256:
        raise UnfitLayer(f"its heads have {head_dim} numbers")
    if model.config.hidden_size % BLOCK:
        raise UnfitLayer(f"its size {model.config.hidden_size} is no multiple of {BLOCK}")

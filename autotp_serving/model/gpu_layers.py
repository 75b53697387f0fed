"""Llama-like layers on a CUDA card: two pieces around attention, ten launches, eight of few tokens.

Ranks on CUDA. The modules are those that transformers built, AutoTP sharded and the loader filled;
the weights of queries, keys and values, and of gate and up, are joined, and the modules keep views
of the joined ones, so that there is one copy. The pieces are written in kernels of our own rather
than compiled from torch: they take any number of tokens without compiling again, round where
transformers' code rounds, and write 8-bit activations where those are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotp_serving.kernels.cuda.activations import (
    Activations,
    HeadsEnd,
    Rotation,
    Rounding,
    quantize_tokens,
    rotate_and_store,
)
from autotp_serving.kernels.cuda.fused_products import can_rotate, multiply_heads
from autotp_serving.kernels.kv_pools import Pools
from autotp_serving.kernels.triton import attention as triton_attention
from autotp_serving.low_bit.formats import BLOCK
from autotp_serving.model.fused_layers import Norm, find_window
from autotp_serving.model.gpu_mlp import GatedMlp, Mixture
from autotp_serving.model.gpu_products import Product, UnfitLayer, join_linears
from autotp_serving.model.gpu_sums import Addend, AddNorm
from autotp_serving.model.kv_cache import KVCache
from autotp_serving.model.step_inputs import StepInputs


@dataclass(frozen=True)
class GpuLayer:
    """One decoder layer.

    Attributes:
        add_norm: the norms, with the sums over the ranks before them.
        workspace: of attention.
    """

    input_norm: Norm
    qkv: Product
    rotation: Rotation
    output: Product
    mlp_norm: Norm
    mlp: GatedMlp | Mixture
    pools: Pools
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    sliding_window: int | None
    add_norm: AddNorm
    workspace: triton_attention.Workspace

    @staticmethod
    def of(
        layer: nn.Module,
        cache: KVCache,
        rotary: tuple[Tensor, Tensor],
        add_norm: AddNorm,
        workspace: triton_attention.Workspace,
    ) -> GpuLayer:
        """Read it from a decoder layer of transformers, whose weights are joined.

        Args:
            rotary: cos and sin [longest, head_dim] bfloat16.

        Raises:
            UnfitLayer: the kernels do not take it.
        """
        attention = layer.self_attn
        qkv = join_linears(attention.q_proj, attention.k_proj, attention.v_proj)
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
            mlp=(Mixture if hasattr(layer.mlp, "experts") else GatedMlp).of(layer.mlp),
            pools=pools,
            num_heads=qkv.weight.shape[0] // head_dim - 2 * num_kv_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scaling=attention.scaling,
            sliding_window=find_window(attention),
            add_norm=add_norm,
            workspace=workspace,
        )

    def run(
        self, hidden: Tensor, added: Addend | None, inputs: StepInputs, rows: Tensor | None = None
    ) -> tuple[Tensor, Addend]:
        """Run the step's tokens through the layer.

        Args:
            hidden: [num_tokens, size] bfloat16, altered.
            added: what is still to be added to it, or None.
            rows: tokens that are needed of the result; None: all. There is at least one.

        Returns:
            The tokens' hidden state, and what is to be added to it next.
        """
        out = self._attend(self._make_heads(hidden, added, inputs), inputs)
        if rows is not None:
            hidden, out = hidden.index_select(0, rows), out.index_select(0, rows)
        attended = quantize_tokens(out, self.output.rounding(len(out)))
        added = Addend(self.output(attended), self.output.bias)

        def add_norm(rounding: Rounding) -> Activations:
            return self.add_norm(hidden, added, self.mlp_norm, rounding)

        return hidden, Addend(self.mlp.run(add_norm, len(hidden)), self.mlp.bias)

    def store(self, hidden: Tensor, added: Addend | None, inputs: StepInputs) -> None:
        """Write the step's keys and values to the cache, and no more; see `run`."""
        self._make_heads(hidden, added, inputs)

    def _make_heads(self, hidden: Tensor, added: Addend | None, inputs: StepInputs) -> Tensor:
        """[num_tokens, all heads, head_dim]: queries, rotated; keys and values are in the cache."""
        x = self.add_norm(hidden, added, self.input_norm, self.qkv.rounding(len(hidden)))
        pools = self.pools
        is_plain = pools.key_scales is None
        end = HeadsEnd(
            self.rotation,
            inputs.positions,
            self.num_heads,
            self.num_kv_heads,
            inputs.slots if is_plain else None,
            (pools.keys, pools.values) if is_plain else None,
        )
        if can_rotate(self.qkv.weight, len(hidden), self.rotation):
            qkv = multiply_heads(x, self.qkv.weight, end)
        else:
            qkv = self.qkv(x)
            rotate_and_store(qkv, end)
        qkv = qkv.view(len(qkv), -1, self.head_dim)
        if not is_plain:
            key = qkv[:, self.num_heads : self.num_heads + self.num_kv_heads]
            value = qkv[:, self.num_heads + self.num_kv_heads :]
            triton_attention.store(key, value, inputs.slots, pools)
        return qkv

    def _attend(self, qkv: Tensor, inputs: StepInputs) -> Tensor:
        """[num_tokens, num_heads * head_dim] bfloat16."""
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


def check_sizes(model: Any, head_dim: int, longest_rotary: Tensor) -> None:
    """Refuse sizes that the kernels' vectors do not divide.

    Raises:
        UnfitLayer: with the size.
    """
    if longest_rotary.shape[-1] != head_dim:  # Phi-3 may rotate a part of a head only
        raise UnfitLayer("it rotates a part of each head")
    if head_dim % 8 or head_dim > 256:
        raise UnfitLayer(f"its heads have {head_dim} numbers")
    if model.config.hidden_size % BLOCK:
        raise UnfitLayer(f"its size {model.config.hidden_size} is no multiple of {BLOCK}")

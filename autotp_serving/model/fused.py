"""A quicker forward pass on CPU for models whose layers are Llama's. Every rank.

The modules are those that transformers built, AutoTP cut and the loader filled; only the way
through them is ours. Where transformers runs thirty small operations a layer, this runs eight:
the norms with the sums before them, queries, keys and values by one product, rotation with the
cache's writes, attention, gate and up by one product, and the gated activation. What each
operation computes, and where it rounds to bfloat16, is as in transformers' code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotp_serving.low_bit.linear import LowBitLinear, make_matmul
from autotp_serving.model.attention import AttentionContext
from autotp_serving.model.kernels.cpu_layer_ops import LayerOps, load_layer_ops
from autotp_serving.model.kv_cache import KVCache
from autotp_serving.plan import StepPlan

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
"""Whose layers are: norm, attention, sum, norm, gated MLP, sum."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm's weight [size] and epsilon."""

    weight: Tensor
    epsilon: float

    @staticmethod
    def of(module: nn.Module) -> Norm:
        """Read it from a module of transformers."""
        return Norm(module.weight.detach(), module.variance_epsilon)


@dataclass(frozen=True)
class Layer:
    """What a pass needs of one decoder layer; products map [num_tokens, ...] to the same.

    Attributes:
        head_norms: of queries and of keys, and their epsilon, or None.
    """

    index: int
    head_dim: int
    scaling: float
    sliding_window: int | None
    input_norm: Norm
    qkv: Callable[[Tensor], Tensor]
    head_norms: tuple[Tensor, Tensor, float] | None
    output: nn.Module
    mlp_norm: Norm
    gate_up: Callable[[Tensor], Tensor]
    down: nn.Module

    @staticmethod
    def of(layer: nn.Module) -> Layer:
        """Read it from a decoder layer of transformers."""
        attention, mlp = layer.self_attn, layer.mlp
        head_norms = None
        if hasattr(attention, "q_norm"):
            query, key = Norm.of(attention.q_norm), Norm.of(attention.k_norm)
            head_norms = (query.weight, key.weight, query.epsilon)
        return Layer(
            index=attention.layer_idx,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
            sliding_window=_find_window(attention),
            input_norm=Norm.of(layer.input_layernorm),
            qkv=join_linears(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norms=head_norms,
            output=attention.o_proj,
            mlp_norm=Norm.of(layer.post_attention_layernorm),
            gate_up=join_linears(mlp.gate_proj, mlp.up_proj),
            down=mlp.down_proj,
        )


class FusedForward:
    """Runs plans as `PlainForward` does, quicker; made by `fuse`."""

    def __init__(self, model: nn.Module, cache: KVCache, ops: LayerOps) -> None:
        decoder = model.model
        self._cache = cache
        self._ops = ops
        self._embedding = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._layers = [Layer.of(layer) for layer in decoder.layers]
        self._norm = Norm.of(decoder.norm)
        self._head = model.get_output_embeddings()

    def __call__(self, plan: StepPlan) -> Tensor:
        """See PlainForward."""
        ops = self._ops
        context = AttentionContext.from_plan(plan, self._cache)
        hidden = self._embedding(torch.tensor(plan.token_ids))
        cos, sin = self._rotary(hidden, torch.tensor([plan.positions]))
        rotary = (cos[0].contiguous(), sin[0].contiguous())
        added = None
        for layer in self._layers:
            x = ops.rms_norm(hidden, added, layer.input_norm.weight, layer.input_norm.epsilon)
            qkv = layer.qkv(x)
            keys, values = self._cache.layer(layer.index)
            ops.rotate_and_store(qkv, rotary, context.slots, keys, values, layer.head_norms)
            heads = qkv.view(len(qkv), -1, layer.head_dim)
            query = heads[:, : heads.shape[1] - 2 * keys.shape[1]]
            attended = context.kernel(query, keys, values, layer.scaling, layer.sliding_window)
            added = layer.output(attended.view(len(qkv), -1))
            x = ops.rms_norm(hidden, added, layer.mlp_norm.weight, layer.mlp_norm.epsilon)
            added = layer.down(ops.silu_multiply(layer.gate_up(x)))
        rows = torch.tensor(plan.logit_rows, dtype=torch.int64)
        hidden, added = hidden[rows], added[rows]
        return self._head(ops.rms_norm(hidden, added, self._norm.weight, self._norm.epsilon))


def fuse(model: nn.Module, cache: KVCache) -> FusedForward | None:
    """The quicker pass, or None where the model or the machine is not for it."""
    config = model.config
    if config.model_type not in FAMILIES or not cache.has_kernel or config.hidden_act != "silu":
        return None
    ops = load_layer_ops()
    if ops is None or not _has_fitting_sizes(model):
        return None
    return FusedForward(model, cache, ops)


@torch.inference_mode()
def _has_fitting_sizes(model: nn.Module) -> bool:
    """Whether the operations' vectors divide what they work on, by a look at the first layer."""
    layer = Layer.of(model.model.layers[0])
    hidden = torch.zeros(1, layer.input_norm.weight.numel(), dtype=model.dtype)
    cos, _ = model.model.rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.int64))
    mlp_size = layer.gate_up(hidden).shape[1] // 2
    rotates_all = cos.shape[-1] == layer.head_dim  # Phi-3 may rotate a part of a head only
    return rotates_all and hidden.shape[1] % 16 == 0 and mlp_size % 16 == 0


def join_linears(*linears: nn.Module) -> Callable[[Tensor], Tensor]:
    """One function for linear layers that share their input: their outputs side by side."""
    if not _can_join(linears):
        return lambda x: torch.cat([linear(x) for linear in linears], dim=-1)
    matmul = make_matmul(*(linear.weight for linear in linears))
    if linears[0].bias is None:
        return matmul
    bias = torch.cat([linear.bias for linear in linears])
    return lambda x: matmul(x).add_(bias)


def _can_join(linears: tuple[nn.Module, ...]) -> bool:
    """Whether their weights are multiplied by one kernel."""
    return (
        all(isinstance(linear, LowBitLinear) and linear.reduce is None for linear in linears)
        and len({linear.weight.format for linear in linears}) == 1
        and len({linear.bias is None for linear in linears}) == 1
    )


def _find_window(attention: Any) -> int | None:
    """How many positions a layer sees: Mistral's and Phi-3's attention ask the whole config."""
    if attention.config.model_type in ("mistral", "phi3"):
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)

"""A quicker forward pass on CPU for models whose layers are Llama's. Every rank.

The modules are those that transformers built, AutoTP sharded and the loader filled; only the way
through them is ours. Where transformers runs thirty small operations a layer, this runs eight:
the norms with the sums before them, queries, keys and values by one product, rotation with the
cache's writes, attention, gate and up by one product, and the gated activation. What each
operation computes, and where it rounds to bfloat16, is as in transformers' code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autotp_serving.batch import Batch
from autotp_serving.kernels.cpu.adapters import AdapterRuns, CpuAdapters, SlotMemory
from autotp_serving.kernels.cpu.attention import CpuCache
from autotp_serving.kernels.cpu.dense import DenseMatmul
from autotp_serving.kernels.cpu.layer_ops import LayerOps, load_layer_ops
from autotp_serving.kernels.cpu.layers import NativeLayer, NativeLayers, Product
from autotp_serving.kernels.cpu.linear import CpuMatmul
from autotp_serving.layers.adapters import AdapterStep, attach
from autotp_serving.layers.dense_linear import DenseLinear, join_dense
from autotp_serving.layers.head import VocabParallelHead
from autotp_serving.layers.low_bit_linear import LowBitLinear, make_matmul
from autotp_serving.model.attention import AttentionContext
from autotp_serving.model.kv_cache import KVCache
from autotp_serving.model.step_inputs import StepInputs

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
class LayerAdapters:
    """What adapters add to a layer's products."""

    qkv: CpuAdapters | None = None
    output: CpuAdapters | None = None
    gate_up: CpuAdapters | None = None
    down: CpuAdapters | None = None


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
    qkv: JoinedLinears
    head_norms: tuple[Tensor, Tensor, float] | None
    output: nn.Module
    mlp_norm: Norm
    gate_up: JoinedLinears
    down: nn.Module
    adapters: LayerAdapters | None = None

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
            sliding_window=find_window(attention),
            input_norm=Norm.of(layer.input_layernorm),
            qkv=join_linears(attention.q_proj, attention.k_proj, attention.v_proj),
            head_norms=head_norms,
            output=attention.o_proj,
            mlp_norm=Norm.of(layer.post_attention_layernorm),
            gate_up=join_linears(mlp.gate_proj, mlp.up_proj),
            down=mlp.down_proj,
        )

    def to_native(self, cache: KVCache) -> NativeLayer | None:
        """The layer for `NativeLayers`, or None where a product is not a kernel's."""
        joined, finished = (self.qkv, self.gate_up), (self.output, self.down)
        if not all(isinstance(linear, LowBitLinear | DenseLinear) for linear in finished):
            return None
        if not all(isinstance(x.matmul, CpuMatmul | DenseMatmul) for x in (*joined, *finished)):
            return None
        adapters = self.adapters or LayerAdapters()
        return NativeLayer(
            qkv=Product(self.qkv.matmul, self.qkv.bias, adapters=adapters.qkv),
            output=Product(self.output.matmul, None, self.output.finish, adapters.output),
            gate_up=Product(self.gate_up.matmul, self.gate_up.bias, adapters=adapters.gate_up),
            down=Product(self.down.matmul, None, self.down.finish, adapters.down),
            input_norm=(self.input_norm.weight, self.input_norm.epsilon),
            mlp_norm=(self.mlp_norm.weight, self.mlp_norm.epsilon),
            head_norms=self.head_norms,
            pools=cache.layer(self.index),
            scaling=self.scaling,
            sliding_window=self.sliding_window,
        )


class FusedForward:
    """Runs steps as `PlainForward` does, quicker; made by `fuse`."""

    def __init__(self, model: nn.Module, cache: KVCache, ops: LayerOps, by_operation: bool) -> None:
        decoder = model.model
        self._cache = cache
        self._ops = ops
        self._embedding = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._layers = [Layer.of(layer) for layer in decoder.layers]
        self._norm = Norm.of(decoder.norm)
        self._head = model.get_output_embeddings()
        self._decoder, self._by_operation = decoder, by_operation
        self._adapter_step = AdapterStep()  # nobody has one
        self._max_adapter_rank = 0
        self._runs: AdapterRuns | None = None
        self._native_layers = self._join_halves()

    def _join_halves(self) -> NativeLayers | None:
        """The layers in two calls each, or None where that cannot be, or is not to be."""
        if self._by_operation:
            return None
        layers = [layer.to_native(self._cache) for layer in self._layers]
        return NativeLayers(self._ops, layers) if all(layers) else None

    def take_adapters(
        self, step: AdapterStep, num_slots: int, max_rank: int
    ) -> dict[nn.Module, FusedAdapters]:
        """Make room for adapters.

        Args:
            step: tells of each step who runs with which.
            max_rank: of an adapter.

        Returns:
            For each linear layer what takes in its part of adapters.
        """
        self._adapter_step, self._max_adapter_rank = step, 3 * max_rank
        sinks: dict[nn.Module, FusedAdapters] = {}
        memory = SlotMemory(num_slots)

        def make(*linears: nn.Module) -> CpuAdapters:
            (cols,) = {linear.weight.shape[1] for linear in linears}
            widths = [linear.weight.shape[0] for linear in linears]
            product = CpuAdapters(self._ops, cols, widths, memory, max_rank)
            for part, linear in enumerate(linears):
                own = linear if len(linears) == 1 else None
                sinks[linear] = FusedAdapters(product, part, own, lambda: self._runs)
            return product

        for index, (layer, decoder_layer) in enumerate(
            zip(self._layers, self._decoder.layers, strict=True)
        ):
            attention, mlp = decoder_layer.self_attn, decoder_layer.mlp
            self._layers[index] = replace(
                layer,
                adapters=LayerAdapters(
                    make(attention.q_proj, attention.k_proj, attention.v_proj),
                    make(attention.o_proj),
                    make(mlp.gate_proj, mlp.up_proj),
                    make(mlp.down_proj),
                ),
            )
        self._native_layers = self._join_halves()
        return sinks

    @property
    def can_draft(self) -> bool:
        """See Forward: a token's logits are the same to the last bit at any width of a step."""
        if self._native_layers is None or not isinstance(self._head, VocabParallelHead):
            return False
        products = [
            product.matmul
            for layer in self._layers
            for product in (layer.qkv, layer.output, layer.gate_up, layer.down)
        ]
        products.append(getattr(self._head.low_bit, "matmul", self._head.matmul))
        return all(
            isinstance(x, DenseMatmul) or (isinstance(x, CpuMatmul) and x.is_exact_at_any_width)
            for x in products
        )

    def find_padded_size(self, batch: Batch) -> int:
        """See Forward."""
        return 0

    def __call__(self, inputs: StepInputs) -> Tensor:
        """See PlainForward."""
        ops = self._ops
        context = AttentionContext.of(inputs, self._cache)
        hidden = self._embedding(inputs.token_ids)
        cos, sin = self._rotary(hidden, inputs.positions[None])
        rotary = (cos[0].contiguous(), sin[0].contiguous())
        native_layers = self._native_layers
        spans = self._adapter_step.spans
        runs = self._runs = AdapterRuns(spans, self._max_adapter_rank) if spans else None
        if native_layers is not None:
            slots, attention = context.inputs.slots, context.attention
            added = native_layers.run(hidden, rotary, slots, attention, runs)
        else:
            added = self._run_operations(hidden, rotary, context, runs)
        rows = inputs.logit_rows
        hidden, added = hidden[rows], added[rows]
        return self._head(ops.rms_norm(hidden, added, self._norm.weight, self._norm.epsilon))

    def _run_operations(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        context: AttentionContext,
        runs: AdapterRuns | None,
    ) -> Tensor:
        """Run the layers operation by operation; see `NativeLayers.run`."""
        ops = self._ops
        added = None
        for layer in self._layers:
            x = ops.rms_norm(hidden, added, layer.input_norm.weight, layer.input_norm.epsilon)
            qkv = layer.qkv(x)
            if runs is not None:
                layer.adapters.qkv.add(x, qkv, runs)
            pools = self._cache.layer(layer.index)
            ops.rotate_and_store(qkv, rotary, context.inputs.slots, pools, layer.head_norms)
            heads = qkv.view(len(qkv), -1, layer.head_dim)
            query = heads[:, : heads.shape[1] - 2 * pools.keys.shape[1]]
            attended = context.attention.attend(
                query, None, pools, layer.scaling, layer.sliding_window
            )
            added = layer.output(attended.view(len(qkv), -1))
            x = ops.rms_norm(hidden, added, layer.mlp_norm.weight, layer.mlp_norm.epsilon)
            gate_up = layer.gate_up(x)
            if runs is not None:
                layer.adapters.gate_up.add(x, gate_up, runs)
            added = layer.down(ops.silu_multiply(gate_up))
        return added


class FusedAdapters:
    """One linear layer's part of adapters. See LinearAdapters.

    Args:
        product: that it is part number `part` of.
        linear: the layer, where the pass calls it by itself when it runs operation by operation.
        get_runs: which tokens of the step under way have adapters.
    """

    def __init__(
        self,
        product: CpuAdapters,
        part: int,
        linear: nn.Module | None,
        get_runs: Callable[[], AdapterRuns | None],
    ) -> None:
        self._product, self._part = product, part
        self._linear, self._get_runs = linear, get_runs
        self._detach: Callable[[], None] | None = None

    def put(self, slot: int, down: Tensor, up: Tensor, scale: float) -> None:
        """See LinearAdapters."""
        self._product.put(slot, self._part, down, up, scale)
        if self._linear is not None and self._detach is None:
            self._detach = attach(self._linear, self._add)

    def drop(self, slot: int) -> None:
        """See LinearAdapters."""
        self._product.drop(slot, self._part)
        if self._detach is not None and self._product.is_empty:
            self._detach()
            self._detach = None

    def _add(self, x: Tensor, out: Tensor) -> None:
        runs = self._get_runs()
        if runs is not None:
            self._product.add(x, out, runs)


def fuse(model: nn.Module, cache: KVCache, *, by_operation: bool = False) -> FusedForward | None:
    """The quicker pass, or None where the model or the machine is not for it.

    Args:
        by_operation: run the operations of a layer one by one, so that each can be timed.
    """
    config = model.config
    has_layout = isinstance(cache.kernels, CpuCache)
    if config.model_type not in FAMILIES or not has_layout or config.hidden_act != "silu":
        return None
    ops = load_layer_ops()
    if ops is None or not _has_fitting_sizes(model):
        return None
    return FusedForward(model, cache, ops, by_operation)


@torch.inference_mode()
def _has_fitting_sizes(model: nn.Module) -> bool:
    """Whether the operations' vectors divide what they work on, by a look at the first layer."""
    layer = Layer.of(model.model.layers[0])
    hidden = torch.zeros(1, layer.input_norm.weight.numel(), dtype=model.dtype)
    cos, _ = model.model.rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.int64))
    mlp_size = layer.gate_up(hidden).shape[1] // 2
    rotates_all = cos.shape[-1] == layer.head_dim  # Phi-3 may rotate a part of a head only
    return rotates_all and hidden.shape[1] % 16 == 0 and mlp_size % 16 == 0


@dataclass(frozen=True)
class JoinedLinears:
    """Linear layers that share their input, as one product: their outputs side by side."""

    matmul: Callable[[Tensor], Tensor]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Map [num_tokens, in_features] to [num_tokens, out_features of all]."""
        out = self.matmul(x)
        return out if self.bias is None else out.add_(self.bias)


def join_linears(*linears: nn.Module) -> JoinedLinears:
    """Join what one kernel can multiply; the others follow each other."""
    if (dense := join_dense(linears)) is not None:
        return JoinedLinears(dense, _join_biases(linears))
    if not _can_join(linears):
        return JoinedLinears(lambda x: torch.cat([linear(x) for linear in linears], -1), None)
    return JoinedLinears(make_matmul(*(linear.weight for linear in linears)), _join_biases(linears))


def _join_biases(linears: tuple[nn.Module, ...]) -> Tensor | None:
    """Of layers that all have one, or none of them."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat(biases) if biases else None


def _can_join(linears: tuple[nn.Module, ...]) -> bool:
    """Whether their weights are multiplied by one kernel."""
    return (
        all(isinstance(linear, LowBitLinear) and linear.reduce is None for linear in linears)
        and len({linear.weight.format for linear in linears}) == 1
        and len({linear.bias is None for linear in linears}) == 1
    )


def find_window(attention: Any) -> int | None:
    """How many positions a layer sees: Mistral's and Phi-3's attention ask the whole config."""
    if attention.config.model_type in ("mistral", "phi3"):
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)

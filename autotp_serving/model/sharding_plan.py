"""How each matrix is sharded, where transformers or a name tells; by AutoTP's layers. Every rank.

AutoTP decides by names alone, and takes a router, say, for a matrix to shard. Most families of
transformers name the matrices that are sharded by rows or columns (`base_model_tp_plan`), and all
others stay whole on every rank; some are told by names that most families share.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autotp_serving.layers.unfuse import Experts, FusedOutput
from autotp_serving.low_bit.formats import BLOCK
from autotp_serving.model.shapes import find_heads, list_layer_configs
from autotp_serving.model.state_layers import StateLayer, find_state_layer

AllReduce = Callable[[torch.Tensor], torch.Tensor]

COLUMN_STYLES = ("colwise", "colwise_gather_output")
ROW_STYLES = ("rowwise", "rowwise_split_input")
SHARDING_BY_NAME = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "column"),
    **dict.fromkeys(("q_b_proj", "kv_b_proj", "g_proj"), "column"),
    **dict.fromkeys(("w1", "w3"), "column"),
    **dict.fromkeys(("o_proj", "down_proj", "out_proj", "w2", "output_linear"), "row"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "whole"),
    **dict.fromkeys(("gate", "router", "shared_expert_gate", "gate.wg"), "whole"),
    **dict.fromkeys(("query", "key", "value", "intermediate.dense", "fc1"), "column"),
    **dict.fromkeys(("out_proj", "output.dense", "fc2"), "row"),
    "self_attn.dense": "row",
    "dense_h_to_4h": "column",
    "dense_4h_to_h": "row",
    **dict.fromkeys(("transform.dense", "lm_head.dense", "project_in", "project_out"), "whole"),
    **dict.fromkeys(("generator_predictions.dense", "embeddings_project"), "whole"),
    **dict.fromkeys(("map_inputs_layer", "embedding_hidden_mapping_in"), "whole"),
}
"""The last one or two parts of Llama's names, of those of latent attention (DeepSeek-V2), LFM2 and
Granite, of routers, and of BERT's, BART's and Persimmon's."""

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "num_query_heads")
QUERY_KEY_VALUE_BY_HEADS = ".view(batch_size, seq_length, self.num_heads, 3, self.head_dim)"
"""In code whose one matrix has queries, keys and values of a head beside each other (Persimmon)."""

NORMS_OF_SHARDS = (
    *(("q_proj", "q_norm"), ("k_proj", "k_norm")),
    *(("o_proj", "attn_sub_norm"), ("down_proj", "ffn_sub_norm")),
)
"""Linear layers, and norms over all of their outputs (of BitNet: their inputs)."""

KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def find_layer_sharding(model: nn.Module) -> dict[str, str] | None:
    """How each linear layer is sharded: by "column" of its output, "row" of its input, or "whole".

    Returns:
        By name, for all but the head; None where neither transformers nor a name tells.
    """
    head = model.get_output_embeddings()
    plan = getattr(model, "_tp_plan", None) or {}
    styles = {
        re.compile(re.escape(pattern).replace(r"\*", r"\d+")): style
        for pattern, style in plan.items()
        if style in COLUMN_STYLES + ROW_STYLES
    }
    is_whole_plan = any("att" in pattern.pattern for pattern in styles)
    sharding = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        style = next((style for one, style in styles.items() if one.fullmatch(name)), None)
        axis = _find_own_sharding(model, name)
        if axis is None and style is not None:
            axis = "column" if style in COLUMN_STYLES else "row"
        if axis is None:  # what a whole plan leaves out stays whole
            parts = name.split(".")
            known = (SHARDING_BY_NAME.get(".".join(parts[-count:])) for count in (2, 1))
            axis = "whole" if is_whole_plan else next(filter(None, known), None)
        if axis is None:
            return None
        sharding[name] = axis
    return sharding if "row" in sharding.values() else None


def _find_own_sharding(model: nn.Module, name: str) -> str | None:
    """Of the parts that our own code has made of others."""
    parent_name, _, last = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if (found := find_state_layer(model, name)) is not None:
        layer, inner_name = found
        return layer.sharding[inner_name]
    experts = model.get_submodule(parent_name.rpartition(".")[0])
    if isinstance(experts, Experts):
        return "whole" if experts.are_whole else SHARDING_BY_NAME[last]
    fused = [one for one in parent.children() if isinstance(one, FusedOutput)]
    if fused and last in ("o_proj", "down_proj"):
        return "row"
    is_by_heads = last == "query_key_value" and QUERY_KEY_VALUE_BY_HEADS in inspect.getsource(
        type(parent)
    )
    if is_by_heads or any(last in one.sizes for one in fused):
        return "column"
    return None


def shard_layers(model: nn.Module, sharding: dict[str, str], all_reduce: AllReduce) -> None:
    """Put AutoTP's layers in the place of those that are sharded.

    Norms over the queries or keys of all heads see all of them, and heads are counted anew.

    Args:
        model: on the meta device.
        sharding: of `find_layer_sharding`.
    """
    from deepspeed import comm
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
    from deepspeed.module_inject.tp_shard import AutoTPMeta

    kinds = {"column": LinearLayer, "row": LinearAllreduce}
    for name, axis in sharding.items():
        if axis != "whole":
            linear = model.get_submodule(name)
            size = linear.out_features if axis == "column" else linear.in_features
            # Low-bit weights are sharded between blocks only, and no rank goes without any.
            grain = BLOCK if size >= BLOCK * comm.get_world_size() else 1
            config = _find_layer_config(model.config.get_text_config(), name)
            meta = AutoTPMeta.from_model_config(config, grain)
            if find_state_layer(model, name) is not None:
                meta = AutoTPMeta(num_kv_heads=comm.get_world_size())  # evenly
            options: dict[str, Any] = {"tp_meta": meta}
            layer = kinds[axis](linear, comm.get_world_group(), name=name, **options)
            model.set_submodule(name, layer.to_empty(device="meta"))
    for module in model.modules():
        if isinstance(module, StateLayer):
            continue  # it takes its share itself
        queries = (getattr(module, name, None) for name in ("q_proj", "query", "query_key_value"))
        query = next(filter(None, queries), None)
        if type(query).__name__ == "LinearLayer":
            _take_share_of_heads(model, module, query)
        query = query or getattr(module, "q_b_proj", None)  # of latent attention
        if type(query).__name__ == "LinearLayer":
            _shard_sinks(module, query)
        for projection, norm in NORMS_OF_SHARDS:
            _gather_for_norm(module, projection, norm, all_reduce)
        _gather_for_sparsity(module, all_reduce)


def _find_layer_config(text_config: Any, name: str) -> Any:
    """Of the layer that a module lies in, by its name."""
    layers = list_layer_configs(text_config)
    number = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    return layers[min(number, len(layers) - 1)]


def _take_share_of_heads(model: nn.Module, attention: nn.Module, query: nn.Module) -> None:
    """Some families shape queries and keys by the config's counts, which are of all ranks."""
    num_heads, num_kv_heads, _ = find_heads(model.config.get_text_config())
    for projection, total, names in (
        (query, num_heads, HEAD_COUNTS),
        (getattr(attention, "k_proj", None), num_kv_heads, KV_HEAD_COUNTS),
    ):
        if projection is None:  # latent keys
            continue
        num_rows = sum(projection._partition_sizes)
        for name in names:
            if getattr(attention, name, None) == total and num_rows % total == 0:
                setattr(attention, name, projection.weight.shape[0] * total // num_rows)


def _shard_sinks(attention: nn.Module, query: nn.Module) -> None:
    """Keep this rank's part of what attention has one number a head of."""
    sinks = getattr(attention, "sinks", None)
    if isinstance(sinks, nn.Parameter):
        num_heads = query.weight.shape[0] * sinks.numel() // sum(query._partition_sizes)
        attention.sinks = nn.Parameter(sinks.new_empty(num_heads), requires_grad=False)


def _gather_for_norm(
    attention: nn.Module, projection_name: str, norm_name: str, all_reduce: AllReduce
) -> None:
    """Give a norm over all heads the outputs of all ranks; it goes on with this rank's part."""
    projection = getattr(attention, projection_name, None)
    norm = getattr(attention, norm_name, None)
    weight = getattr(norm, "weight", None)
    sizes = getattr(projection, "_partition_sizes", ())
    if weight is None or tuple(weight.shape) != (sum(sizes),) or len(sizes) < 2:
        return
    start = sum(sizes[: projection.tp_index])
    norm.forward = GatheredNorm(norm.forward, start, sum(sizes), all_reduce)


def _gather_for_sparsity(mlp: nn.Module, all_reduce: AllReduce) -> None:
    """Gemma 3n keeps the largest of all gates of a token, told by their mean and deviation."""
    gate = getattr(mlp, "gate_proj", None)
    sizes = getattr(gate, "_partition_sizes", ())
    if hasattr(mlp, "_gaussian_topk") and len(sizes) > 1:
        start = sum(sizes[: gate.tp_index])
        mlp._gaussian_topk = GatheredNorm(mlp._gaussian_topk, start, sum(sizes), all_reduce)


class GatheredNorm:
    """The forward pass of a norm, or of its like, whose input lies on all ranks.

    Args:
        normalize: [..., num_columns] to the same, on one rank.
        start: this rank's first column.
        num_columns: of all ranks together.
    """

    def __init__(
        self,
        normalize: Callable[[torch.Tensor], torch.Tensor],
        start: int,
        num_columns: int,
        all_reduce: AllReduce,
    ) -> None:
        self._normalize = normalize
        self._start = start
        self._num_columns = num_columns
        self._all_reduce = all_reduce

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map [..., this rank's columns] to the same shape."""
        part = slice(self._start, self._start + hidden.shape[-1])
        whole = hidden.new_zeros(*hidden.shape[:-1], self._num_columns)
        whole[..., part] = hidden
        return self._normalize(self._all_reduce(whole))[..., part]

"""Which matrix is cut how, by transformers' own plan; AutoTP's work is brought in line. Every rank.

AutoTP decides by names, and takes a router, say, for a matrix to cut. Most families of transformers
name the matrices that are cut by rows or columns (`base_model_tp_plan`); all others stay whole on
every rank. Where AutoTP has cut another matrix, or left one of these whole, its own layers are put
in place as the plan has them. A family without a plan is judged by `families.check_sharding`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotp_serving.layers.unfuse import Experts, FusedOutput

AllReduce = Callable[[torch.Tensor], torch.Tensor]

COLUMN_STYLES = ("colwise", "colwise_gather_output")
ROW_STYLES = ("rowwise", "rowwise_split_input")
LAYER_OF = {"column": "LinearLayer", "row": "LinearAllreduce", "whole": "Linear"}
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "num_query_heads")
KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


@dataclass(frozen=True)
class Matrix:
    """A linear layer before AutoTP: shapes and no memory."""

    out_features: int
    in_features: int
    has_bias: bool
    dtype: torch.dtype

    def build(self) -> nn.Linear:
        return nn.Linear(
            self.in_features, self.out_features, self.has_bias, device="meta", dtype=self.dtype
        )


def list_matrices(model: nn.Module) -> dict[str, Matrix]:
    """All linear layers but the head, by name; before AutoTP."""
    head = model.get_output_embeddings()
    return {
        name: Matrix(
            module.out_features, module.in_features, module.bias is not None, module.weight.dtype
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def find_plan(model: nn.Module) -> dict[str, str] | None:
    """Styles by pattern of module names; None where transformers does not cut its attention."""
    plan = {
        pattern: style
        for pattern, style in (getattr(model, "_tp_plan", None) or {}).items()
        if style in COLUMN_STYLES + ROW_STYLES
    }
    has_attention = any(pattern.endswith(".o_proj") for pattern in plan)
    return plan if has_attention and any(style in ROW_STYLES for style in plan.values()) else None


def follow_plan(
    model: nn.Module, plan: dict[str, str], matrices: dict[str, Matrix], all_reduce: AllReduce
) -> None:
    """Make each linear layer what the plan wants; after AutoTP.

    Norms over the queries or keys of all heads see all of them, and heads are counted anew.

    Args:
        matrices: what was there before AutoTP.
    """
    from deepspeed import comm
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer
    from deepspeed.module_inject.tp_shard import AutoTPMeta

    options: dict[str, Any] = {"tp_meta": AutoTPMeta.from_model_config(model.config)}
    for name, matrix in matrices.items():
        wanted = _find_cut(model, plan, name)
        if type(model.get_submodule(name)).__name__ == LAYER_OF[wanted]:
            continue
        layer: nn.Module = matrix.build()
        if wanted != "whole":
            kind = LinearLayer if wanted == "column" else LinearAllreduce
            layer = kind(layer, comm.get_world_group(), name=name, **options)
        model.set_submodule(name, layer.to_empty(device="meta"))
    for module in model.modules():
        query = getattr(module, "q_proj", None)
        if type(query).__name__ == "LinearLayer":
            _take_share_of_heads(model, module)
            for projection, norm in (("q_proj", "q_norm"), ("k_proj", "k_norm")):
                _gather_for_norm(module, projection, norm, all_reduce)


def _find_cut(model: nn.Module, plan: dict[str, str], name: str) -> str:
    """How a linear layer is cut: by "column" of its output, by "row" of its input, or "whole"."""
    parent_name, _, last = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    grandparent = model.get_submodule(parent_name.rpartition(".")[0])
    if isinstance(grandparent, Experts):
        return "row" if last == "down_proj" else "column"
    if any(isinstance(one, FusedOutput) and last in one.sizes for one in parent.children()):
        return "column"
    for pattern, style in plan.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name):
            return "column" if style in COLUMN_STYLES else "row"
    return "whole"


def _take_share_of_heads(model: nn.Module, attention: nn.Module) -> None:
    """Some families shape queries and keys by the config's count of heads, which is of all ranks."""
    config = model.config.get_text_config()
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    for projection, total, names in (
        (attention.q_proj, num_heads, HEAD_COUNTS),
        (attention.k_proj, num_kv_heads, KV_HEAD_COUNTS),
    ):
        num_rows = sum(projection._partition_sizes)
        for name in names:
            if getattr(attention, name, None) == total and num_rows % total == 0:
                setattr(attention, name, projection.weight.shape[0] * total // num_rows)


def _gather_for_norm(
    attention: nn.Module, projection_name: str, norm_name: str, all_reduce: AllReduce
) -> None:
    """Give a norm over all heads the outputs of all ranks; it goes on with this rank's part."""
    projection, norm = getattr(attention, projection_name), getattr(attention, norm_name, None)
    weight = getattr(norm, "weight", None)
    sizes = getattr(projection, "_partition_sizes", ())
    if weight is None or tuple(weight.shape) != (sum(sizes),) or len(sizes) < 2:
        return
    start = sum(sizes[: projection.tp_index])
    norm.forward = GatheredNorm(norm.forward, start, sum(sizes), all_reduce)


class GatheredNorm:
    """The forward pass of a norm whose input lies on all ranks.

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

"""Which block of each checkpoint tensor this rank keeps. Every rank."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotp_serving.distributed.launch import RankGroup
from autotp_serving.layers.head import PoolingHead, VocabParallelHead
from autotp_serving.layers.unfuse import list_absent_tensors
from autotp_serving.low_bit.selection import is_linear
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.leftovers import check_leftovers
from autotp_serving.model.shapes import ModelShapes, TensorShape
from autotp_serving.model.state_layers import list_state_layers
from autotp_serving.model.stored_tensors import CheckpointError

logger = logging.getLogger(__name__)

Range = tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """This rank's block of one tensor: (start, stop) of each dimension of the whole."""

    full_shape: tuple[int, ...]
    ranges: tuple[Range, ...]

    @property
    def num_elements(self) -> int:
        """Numbers in the block."""
        return math.prod(stop - start for start, stop in self.ranges)


def find_shards(model: nn.Module, checkpoint: Checkpoint, group: RankGroup) -> dict[str, Shard]:
    """Lay the ranks' shapes, which AutoTP chose, side by side over the checkpoint's tensors.

    Args:
        model: on the meta device, sharded.

    Returns:
        A shard for each parameter and persistent buffer, by name; a tied head has none.

    Raises:
        CheckpointError: a tensor is missing or the shapes do not fit, named.
    """
    head_name = find_head_name(model)
    is_tied = model.config.get_text_config().tie_word_embeddings
    is_tied &= isinstance(model.get_output_embeddings(), VocabParallelHead)
    local_shapes = {
        name: tuple(value.shape)
        for name, value in _list_tensors(model)
        if not (is_tied and name == f"{head_name}.weight")
    }
    all_shapes = group.all_gather(local_shapes)
    known = checkpoint.names()
    shards = {}
    for name, local_shape in local_shapes.items():
        if name not in known:
            raise CheckpointError(
                f"{checkpoint.folder} has no tensor {name}: it does not belong to this "
                f"architecture ({type(model).__name__}), is incomplete, or the family "
                f"'{model.config.model_type}' names its tensors in a way that is not known here"
            )
        full_shape = checkpoint.shape(name)
        if len(full_shape) != len(local_shape):
            raise CheckpointError(
                f"tensor {name} has shape {full_shape}, but config.json asks for {local_shape}"
            )
        # Of an expert that is whole on one rank, no other has a shape.
        rank_shapes = [shapes[name] for shapes in all_shapes if name in shapes]
        ranges = []
        for dim, full_size in enumerate(full_shape):
            found = _find_range([shape[dim] for shape in rank_shapes], full_size, group.rank)
            if found is None:
                raise CheckpointError(
                    f"tensor {name} has shape {full_shape}, but config.json and {group.size} "
                    f"ranks ask for {rank_shapes}"
                )
            ranges.append(found)
        shards[name] = Shard(full_shape, tuple(ranges))
    report_unused(model, checkpoint, is_reporter=group.rank == 0)
    return shards


def find_head_name(model: nn.Module) -> str:
    """Module name of the output head, or of what stands in its place."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def _find_range(sizes: list[int], full_size: int, rank: int) -> Range | None:
    """Part of one dimension: all of it, or this rank's piece if the pieces tile it."""
    if all(size == full_size for size in sizes):
        return 0, full_size
    if sum(sizes) != full_size:
        return None
    stop = list(itertools.accumulate(sizes))[rank]
    return stop - sizes[rank], stop


def _list_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers that a checkpoint holds, by name, shared ones once."""
    persistent = set(model.state_dict(keep_vars=True))
    buffers = ((name, value) for name, value in model.named_buffers() if name in persistent)
    return [*model.named_parameters(), *buffers]


def describe_shapes(model: nn.Module) -> ModelShapes:
    """The shapes of this rank's model, for what its memory is planned by.

    Args:
        model: on the meta device, sharded.
    """
    head_name = f"{find_head_name(model)}.weight"
    embedding = model.get_input_embeddings().weight
    tensors, embedding_name, head = [], "", None
    own_head = model.get_output_embeddings()
    if isinstance(own_head, PoolingHead):
        head = TensorShape(head_name, (own_head.num_labels, own_head.hidden_size), False)
    for name, value in _list_tensors(model):
        module_name, _, attribute = name.rpartition(".")
        is_weight = attribute == "weight" and is_linear(model.get_submodule(module_name))
        tensor = TensorShape(name, tuple(value.shape), is_weight)
        if name == head_name:
            head = tensor
            continue
        tensors.append(tensor)
        if value is embedding:
            embedding_name = name
    state_layers = list_state_layers(model)
    modules = [one for one in model.modules() if type(one).__name__.endswith("Attention")]
    attention = {module.layer_idx for module in modules if hasattr(module, "layer_idx")}
    return ModelShapes(
        text_config=model.config.get_text_config(),
        tensors=tuple(tensors),
        embedding_name=embedding_name,
        head=head,
        dtype=str(model.dtype).removeprefix("torch."),
        attention_layers=tuple(sorted(attention)) if state_layers else None,
        state_bytes_per_row=sum(layer.bytes_per_row for layer in state_layers),
    )


def report_unused(model: nn.Module, checkpoint: Any, is_reporter: bool) -> None:
    """Refuse tensors that the model should have used, and tell of others in one line.

    Args:
        model: on the meta device; the checkpoint's tensors have its names.
        is_reporter: on one rank only.

    Raises:
        CheckpointError: naming a tensor that lies inside the model.
    """
    own = set(model.state_dict(keep_vars=True)) | list_absent_tensors(model)
    leftovers = {name for name in checkpoint.names() - own if not _is_zero_bias(name, checkpoint)}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    shapes = {name: checkpoint.shape(name) for name in leftovers}
    unused = check_leftovers(leftovers, own, shapes, tuple(ignored))
    if unused and is_reporter:
        logger.warning(
            "%d tensors of the checkpoint are not used, of parts that this model does not have: %s",
            len(unused),
            ", ".join(unused[:5]),
        )


def _is_zero_bias(name: str, checkpoint: Any) -> bool:
    """True for a bias that adds nothing: some quantizers write one for layers without."""
    if not name.endswith(".bias") or len(checkpoint.shape(name)) != 1:
        return False
    return not checkpoint.read(name, ((0, checkpoint.shape(name)[0]),)).any()

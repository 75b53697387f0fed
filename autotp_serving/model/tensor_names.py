"""From the names of a model's tensors to those in its checkpoint. Every rank.

The checkpoint keeps the names of its day, while the model has those of the installed transformers,
in which some layers were renamed or stacked, and our own parts (`unfuse.py`) take the place of
others. Transformers says itself what it renames and stacks (its conversion mapping).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from autotp_serving.layers.head import PoolingHead
from autotp_serving.layers.unfuse import Experts, FusedOutput, list_absent_tensors
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.shards import find_head_name

# Model's name, checkpoint's name; tried in this order for a tensor that the checkpoint lacks: for
# transformers 4, where transformers 5 leaves a tied head's name open, for the bias of BERT's head,
# and (the last three) inside a vision-language model.
RENAMED = (
    (r"^lm_head\.", "embed_out."),
    (r"^embed_out\.", "lm_head."),
    (r"\.decoder\.bias$", ".bias"),
    (r"\.mlp\.gate\.", ".block_sparse_moe.gate."),
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
    (r"^model\.", "language_model.model."),
    (r"^model\.", "model.language_model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)
CLASSIFIER_NAME = "score.weight"
"""As transformers' ...ForSequenceClassification have it."""

STACKED_PARTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
GATE_UP_BIAS = "gate_up_proj_bias"
"""Of the stacked biases, those that are taken apart; the others stay one tensor (`Experts`)."""


def match_tensor_names(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give the checkpoint's tensors the names of the model's.

    Args:
        model: on the meta device.
    """
    wanted = set(model.state_dict(keep_vars=True)) | list_absent_tensors(model)
    head = model.get_output_embeddings()
    if isinstance(head, PoolingHead):
        _match_classifier(find_head_name(model), head, checkpoint)
    known = checkpoint.names()
    experts = {name: one for name, one in model.named_modules() if isinstance(one, Experts)}
    fused = {name: one for name, one in model.named_modules() if isinstance(one, FusedOutput)}
    sources: dict[str, str] = {}  # of fused layers, by the model's name
    for source, target, part in _rename(model, sorted(known - wanted)):
        parent, _, last = target.rpartition(".")
        if parent in experts and last in STACKED_PARTS:
            if part is None:
                _match_stack(parent, experts[parent], last, source, checkpoint)
                continue
            number, position = part
            target = f"{parent}.{number}.{STACKED_PARTS[last][position]}.weight"
        elif parent in experts and last == GATE_UP_BIAS:
            _match_stack(parent, experts[parent], last, source, checkpoint)
            continue
        if parent in fused:
            sources[target] = source
        elif target in wanted and target not in known:
            checkpoint.add_view(target, source, 0, checkpoint.shape(source)[0])
    known = checkpoint.names()
    for name in wanted - known:
        if (source := _find_renamed(name, known)) is not None:
            checkpoint.add_view(name, source, 0, checkpoint.shape(source)[0])
    for name, module in fused.items():
        for attribute in ("weight", "bias"):
            target = f"{name}.{attribute}"
            source = sources.get(target) or _find_renamed(target, known)
            if source is not None:
                _match_parts(name, attribute, module.sizes, source, checkpoint)


def _find_renamed(name: str, known: set[str]) -> str | None:
    """The checkpoint's name for a tensor of the model, by what is renamed for all families."""
    if name in known:
        return name
    for pattern, replacement in RENAMED:
        source = re.sub(pattern, replacement, name)
        if source != name and source in known:
            return source
    return None


def _match_classifier(name: str, head: PoolingHead, checkpoint: Checkpoint) -> None:
    """Let a stored classifier have the head's name, and hide an output head that is not needed."""
    if head.weight is None:
        checkpoint.hide({f"{name}.weight"})
    elif CLASSIFIER_NAME in checkpoint.names():
        num_labels = checkpoint.shape(CLASSIFIER_NAME)[0]
        checkpoint.add_view(f"{name}.weight", CLASSIFIER_NAME, 0, num_labels)


def _rename(
    model: nn.Module, sources: list[str]
) -> Iterator[tuple[str, str, tuple[int, int] | None]]:
    """What transformers calls tensors of a checkpoint.

    Yields:
        The checkpoint's name, transformers' name, and where it is one of many that transformers
        stacks in that tensor: its number, and which of the matrices of that number it is.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4 loads what a checkpoint says
        return
    transforms = get_model_conversion_mapping(model)
    names = set(model.state_dict(keep_vars=True))
    modules = {name for name, _ in model.named_modules()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for source in sources:
        target, part = source, None
        for transform in transforms:
            if not isinstance(transform, WeightConverter):
                target, _ = transform.rename_source_key(target)
        for transform in transforms:
            # What is a tensor of its own here goes into none.
            if isinstance(transform, WeightConverter) and target not in names:
                renamed, pattern = transform.rename_source_key(target)
                if pattern is not None:
                    part = _find_part(transform, pattern, target)
                    target = renamed
                    break
        stem = target.rpartition(".")[0]
        if prefix + target in names or (stem not in modules and prefix + stem in modules):
            target = prefix + target
        elif target.startswith(prefix) and target.removeprefix(prefix) in names:
            target = target.removeprefix(prefix)
        yield source, target, part


def _find_part(converter: Any, pattern: str, name: str) -> tuple[int, int] | None:
    """The number that stands for the `*` of a converter's source, and which source it is."""
    found = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    if found is None or not found.groups():
        return None
    return int(found[1]), converter.source_patterns.index(pattern)


def _match_stack(
    name: str, experts: Experts, stack: str, source: str, checkpoint: Checkpoint
) -> None:
    """Let the experts of a layer be slices of one tensor of the checkpoint."""
    shape = checkpoint.shape(source)
    is_bias = stack == GATE_UP_BIAS
    if len(shape) != (2 if is_bias else 3) or shape[0] != len(experts):
        return  # the missing ones are named later
    is_transposed = experts.is_transposed and not is_bias
    num_rows = shape[2 if is_transposed else 1]
    parts = STACKED_PARTS[stack.removesuffix("_bias")]
    size = num_rows // len(parts)
    for number in range(len(experts)):
        for position, part in enumerate(parts):
            step = len(parts) if experts.is_interleaved else 1
            checkpoint.add_slice(
                f"{name}.{number}.{part}.{'bias' if is_bias else 'weight'}",
                source,
                number,
                position if step > 1 else position * size,
                size,
                step=step,
                is_transposed=is_transposed,
            )


def _match_parts(
    fused_name: str, attribute: str, sizes: dict[str, int], source: str, checkpoint: Checkpoint
) -> None:
    """Let each part of a fused layer be some rows of the checkpoint's tensor."""
    parent = fused_name.rpartition(".")[0]
    start = 0
    for part, size in sizes.items():
        checkpoint.add_view(f"{parent}.{part}.{attribute}", source, start, start + size)
        start += size

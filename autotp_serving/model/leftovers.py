"""Tensors that a checkpoint holds and nobody asked for. Every rank; no torch, as --plan is quick.

A tensor that is passed over in silence may be the scale without which a weight means nothing. What
lies inside a part of the model is refused by name; what belongs to parts that the model does not
have (a vision tower, layers that predict further tokens) is reported in one line.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from autotp_serving.model.stored_tensors import FLOATS, CheckpointError, StoredTensor

HARMLESS = (
    r"inv_freq$",  # rotary frequencies, which config.json tells too
    r"\.rotary_emb\.(cos|sin)_cached$",
    r"\.self_attn\.(slope_rate|(query|key|diagonal)_decay)$",  # of MiniMax, which it tells too
    r"\.masked_bias$",  # of old attention code, with the causal mask beside it
    r"\.position_ids$",
)
CAUSAL_MASKS = (r"\.attention\.bias$", r"\.attn\.bias$")
"""Harmless where they are masks, [1, 1, n, n]: a bias has one dimension."""

# Last parts of the names of tensors that go with a quantized weight, and with nothing else.
QUANTIZED_SUFFIXES = (
    *("qweight", "qzeros", "g_idx", "weight_packed", "weight_shape", "weight_g_idx"),
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point"),
    *("weight_global_scale", "weight_format", "input_scale", "input_scale_inv"),
    *("input_zero_point", "input_global_scale", "activation_scale", "activation_scale_inv"),
    *("output_scale", "SCB", "absmax", "quant_map", "nested_absmax", "nested_quant_map"),
    *("q_scale", "k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point"),
)


def is_quantized_part(name: str) -> bool:
    """True for the name of a tensor that is a part of a quantized weight, not one of its own."""
    return name.rpartition(".")[2] in QUANTIZED_SUFFIXES or ".weight.quant_state." in name


def check_stored(stored: Mapping[str, StoredTensor], names: Collection[str]) -> None:
    """Refuse what can be no weight by its name or type, whatever the model is.

    Args:
        stored: all tensors of a folder.
        names: those of them that would be taken as they are.

    Raises:
        CheckpointError: naming one of them.
    """
    taken = sorted(name for name in names if name in stored)
    if parts := [name for name in taken if is_quantized_part(name)]:
        raise CheckpointError(_describe_part(stored[parts[0]].path.parent, parts))
    for name in taken:
        if name.endswith(".weight"):
            check_type(name, stored[name])


def check_type(name: str, tensor: StoredTensor) -> None:
    """Refuse a tensor whose numbers are not what they stand for.

    Raises:
        CheckpointError: naming it, and its type.
    """
    if tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{tensor.path.parent}: {name} is stored as {tensor.dtype}, and nothing in the folder "
            "says what its numbers mean: get the complete checkpoint, whose config.json has a "
            "quantization_config, or the 16-bit original"
        )


def check_leftovers(
    leftovers: Iterable[str],
    model_names: Collection[str],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: Sequence[str] = (),
) -> list[str]:
    """Refuse what lies inside the model and would be passed over.

    Args:
        leftovers: names of tensors that the model does not use.
        model_names: names of the tensors that it has.
        shapes: of the leftovers.
        ignored: patterns of further names that do no harm, as the family's code has them.

    Returns:
        The others: they belong to parts that the model does not have.

    Raises:
        CheckpointError: naming one, and how many there are.
    """
    unused = [name for name in sorted(leftovers) if not _is_harmless(name, shapes[name], ignored)]
    modules = {name.rpartition(".")[0] for name in model_names}
    ancestors = {
        ".".join(parts[:count])
        for parts in (name.split(".") for name in modules)
        for count in range(1, len(parts) + 1)
    }
    inside = [name for name in unused if _lies_inside(name, modules, ancestors)]
    if inside:
        raise CheckpointError(
            f"the checkpoint holds {_name_first(inside)}, which the model that config.json "
            "describes does not have: without it the answers would be wrong; get the checkpoint's "
            "own config.json, or another copy of the checkpoint"
        )
    return unused


def _describe_part(folder: Path, names: Sequence[str]) -> str:
    return (
        f"{folder} holds {_name_first(names)}, part of a quantized weight that is not understood "
        "here: get the complete checkpoint, whose config.json has a quantization_config, or the "
        "16-bit original"
    )


def _name_first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _lies_inside(name: str, modules: Collection[str], ancestors: Collection[str]) -> bool:
    """True below a module with tensors of its own, or anywhere in a layer that the model has."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        parent = ".".join(parts[:count])
        if parent in ancestors:
            return parent in modules or any(part.isdigit() for part in parts[:count])
    return False


def _is_harmless(name: str, shape: tuple[int, ...], ignored: Sequence[str]) -> bool:
    if any(re.search(pattern, name) for pattern in HARMLESS):
        return True
    if len(shape) == 4 and any(re.search(pattern, name) for pattern in CAUSAL_MASKS):
        return True
    return any(re.search(pattern, name) for pattern in ignored) and not is_quantized_part(name)

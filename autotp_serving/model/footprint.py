"""What one rank's part of a model takes, told from shapes before any weight is read. Every rank.

The shapes are those of the model on the meta device after AutoTP has cut it, so the split is
AutoTP's own and the formats are those that the loader will use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autotp_serving.config import ServingConfig
from autotp_serving.low_bit.convert import LowBitPlan
from autotp_serving.low_bit.formats import Format
from autotp_serving.model.head import VocabParallelHead
from autotp_serving.plan import MAX_SCORED_ROWS
from autotp_serving.ranks import Control

KINDS = ("embedding", "attention", "MLP", "head", "norms", "other")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank.

    Attributes:
        weights: by kind and format.
        kv_bytes_per_block: of one page over all layers.
        activation_bytes: most that a step of max_num_batched_tokens holds at once, estimated.
        load_bytes: most that this rank holds on the host while it loads, the process itself not
            counted; on CPU that includes the weights already placed.
    """

    weights: dict[tuple[str, str], int]
    kv_bytes_per_block: int
    activation_bytes: int
    load_bytes: int

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return sum(self.weights.values())


@dataclass(frozen=True)
class _Weight:
    """A tensor of the model: where it belongs, and its bytes as read and as kept."""

    kind: str
    format: str
    read_bytes: int
    kept_bytes: int
    is_converted_here: bool


def find_footprint(
    model: nn.Module,
    checkpoint: Any,
    low_bit: LowBitPlan,
    config: ServingConfig,
    control: Control,
    max_model_len: int,
    on_cpu: bool,
) -> Footprint:
    """Add up this rank's shapes.

    Args:
        model: this rank's, cut, on the meta device.
        checkpoint: names tensors that are stored converted.
        on_cpu: weights stay in host memory.
    """
    weights: dict[tuple[str, str], int] = {}
    held = load_bytes = 0
    for weight in _list_weights(model, checkpoint, low_bit):
        key = weight.kind, weight.format
        weights[key] = weights.get(key, 0) + weight.kept_bytes
        # The mapped file and its copy; then the copy, the planes and the planes in the kernels'
        # order.
        steps = [2 * weight.read_bytes]
        if weight.is_converted_here:
            steps.append(weight.read_bytes + 2 * weight.kept_bytes)
        load_bytes = max(load_bytes, held + max(steps))
        held += weight.kept_bytes if on_cpu else 0
    kv_shape = _find_kv_numbers(model.config.get_text_config(), control)
    return Footprint(
        weights={key: size for key, size in weights.items() if size},
        kv_bytes_per_block=kv_shape * config.block_size * model.dtype.itemsize,
        activation_bytes=estimate_activations(model, config, control, max_model_len),
        load_bytes=load_bytes,
    )


def _list_weights(model: nn.Module, checkpoint: Any, low_bit: LowBitPlan) -> Iterator[_Weight]:
    """Every parameter and stored buffer in the loader's order; a converted head comes last."""
    dense_name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.dtype, "fp32")
    head_name, head = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, VocabParallelHead)
    )
    embedding = model.get_input_embeddings().weight
    persistent = set(model.state_dict(keep_vars=True))
    buffers = [(name, value) for name, value in model.named_buffers() if name in persistent]
    for name, value in [*model.named_parameters(), *buffers]:
        if name == f"{head_name}.weight":
            continue
        module_name, _, attribute = name.rpartition(".")
        kind = "embedding" if value is embedding else _find_kind(name)
        stored = checkpoint.low_bit_format(name)
        converts = attribute == "weight" and low_bit.converts(
            module_name, model.get_submodule(module_name)
        )
        yield _weigh(kind, value, stored, low_bit.linears if converts else None, dense_name)
    stored = checkpoint.low_bit_format(f"{head_name}.weight")
    is_tied = model.config.get_text_config().tie_word_embeddings
    if stored is None and low_bit.head is None and is_tied:
        return
    yield _weigh("head", head.weight, stored, low_bit.head, dense_name)


def _weigh(
    kind: str, value: torch.Tensor, stored: Format | None, target: Format | None, dense_name: str
) -> _Weight:
    format = stored or target
    kept = value.nbytes if format is None else format.num_bytes(*value.shape)
    return _Weight(
        kind=kind,
        format=dense_name if format is None else format.name,
        read_bytes=value.nbytes if stored is None else kept,
        kept_bytes=kept,
        is_converted_here=format is not None,
    )


def _find_kind(name: str) -> str:
    if "norm" in name:
        return "norms"
    if "attn" in name or "attention" in name:
        return "attention"
    if any(part in name for part in ("mlp", "moe", "expert", "feed_forward")):
        return "MLP"
    return "other"


def _find_kv_numbers(config: Any, control: Control) -> int:
    """Numbers of one token's keys and values over all layers: AutoTP deals heads out in turn."""
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    own_heads = num_heads // control.size + (control.rank < num_heads % control.size)
    return 2 * own_heads * _head_dim(config) * config.num_hidden_layers


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def count_loaded(model: nn.Module) -> int:
    """Bytes of the weights of a model that is loaded; a tied head is a view of the embedding."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    is_view = head is not None and (
        head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()
    )
    buffers = (
        value
        for module in model.modules()
        for name, value in module._buffers.items()
        if value is not None and name not in module._non_persistent_buffers_set
    )
    held = sum(value.nbytes for value in (*model.parameters(), *buffers))
    return held - (head.nbytes if is_view else 0)


def estimate_activations(
    model: nn.Module, config: ServingConfig, control: Control, max_model_len: int
) -> int:
    """Most bytes that one step holds at once, of the steps that a layer consists of.

    Counted are the tensors that transformers' code holds at its widest points: the norm in
    float32; queries, keys and values with the temporaries of their rotation, the context's keys
    and values gathered for one sequence and repeated per query head, and its mask; gate, up and
    product of the MLP; logits with a float32 copy for sampling. Not counted: the allocator's
    waste, and what kernels use inside.
    """
    text = model.config.get_text_config()
    size = model.dtype.itemsize
    num_tokens, hidden = config.max_num_batched_tokens, text.hidden_size
    head_dim, num_heads = _head_dim(text), text.num_attention_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    own_kv_heads = -(-num_kv_heads // control.size)
    queries = own_kv_heads * (num_heads // num_kv_heads) * head_dim
    keys = own_kv_heads * head_dim
    wide = max(
        (
            value.shape[0]
            for name, value in model.named_parameters()
            if _find_kind(name) == "MLP" and value.dim() == 2
        ),
        default=hidden,
    )
    num_rows = min(num_tokens, config.max_num_seqs + MAX_SCORED_ROWS)
    copies = 1 if control.size == 1 else 2
    norm = num_tokens * hidden * (2 * size + 8)
    rotation = num_tokens * (2 * hidden + 4 * queries + 4 * keys) * size
    context = max_model_len * (2 * keys + 2 * queries) * size
    mask = min(num_tokens, max_model_len) * max_model_len
    attention = num_tokens * (2 * hidden + 2 * queries + 2 * keys) * size + context + mask
    mlp = num_tokens * (2 * hidden + 3 * wide) * size
    logits = num_rows * text.vocab_size * (copies * size + 4)
    return max(norm, rotation, attention, mlp, logits)

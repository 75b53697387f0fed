"""What one rank's part of a model takes, told from shapes before any weight is read. Every rank.

No torch: `--plan` answers before it could be imported. The shapes are those of a model on the meta
device after AutoTP has sharded it (`model/shards.py`), or those known before (`known_shapes.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from autotp_serving.batch import MAX_SCORED_ROWS
from autotp_serving.config import ServingConfig
from autotp_serving.low_bit.formats import Format
from autotp_serving.low_bit.selection import LowBitSelection
from autotp_serving.model.shapes import (
    DTYPES,
    ModelShapes,
    TensorShape,
    count_head_bytes,
    count_indexers,
    find_heads,
    find_kv_heads,
    find_kv_sources,
    list_layer_configs,
)

DRAFT_KIND = "draft model"
KINDS = ("embedding", "attention", "MLP", "head", "norms", "other", DRAFT_KIND)


@dataclass(frozen=True)
class MemorySetup:
    """What the memory of every rank depends on.

    Attributes:
        max_model_len: most tokens of a sequence.
        on_cpu: weights and cache are in the host's memory, which its ranks share.
        num_ranks, local_size: ranks in all, and of them on one host.
    """

    config: ServingConfig
    max_model_len: int
    on_cpu: bool
    num_ranks: int = 1
    local_size: int = 1

    @property
    def blocks_per_sequence(self) -> int:
        """KV blocks of a sequence of the full length."""
        return -(-self.max_model_len // self.config.block_size)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank.

    Attributes:
        weights: by kind and format.
        kv_bytes_per_block: of one block over all layers.
        activation_bytes: most that a step of max_num_batched_tokens holds at once, estimated.
        load_bytes: most that this rank holds on the host while it loads, the process itself not
            counted; on CPU that includes the weights already placed.
        state_bytes: of the states that some layers keep beside the KV blocks, of all rows.
    """

    weights: dict[tuple[str, str], int]
    kv_bytes_per_block: int
    activation_bytes: int
    load_bytes: int
    state_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return sum(self.weights.values())

    @property
    def fixed_bytes(self) -> int:
        """What does not depend on the size of the cache."""
        return self.weight_bytes + self.activation_bytes + self.state_bytes


@dataclass(frozen=True)
class _Weight:
    """A tensor of the model: where it belongs, and its bytes as read and as kept."""

    kind: str
    format: str
    read_bytes: int
    kept_bytes: int
    is_converted_here: bool


def find_footprint(
    shapes: ModelShapes,
    checkpoint: Any,
    low_bit: LowBitSelection,
    setup: MemorySetup,
    rank: int,
) -> Footprint:
    """Add up a rank's shapes.

    Args:
        checkpoint: names tensors that are stored converted; None when there are none.
    """
    num_state_rows = setup.config.num_rows + setup.config.num_kept_states
    weights: dict[tuple[str, str], int] = {}
    held = load_bytes = 0
    for weight in _list_weights(shapes, checkpoint, low_bit):
        key = weight.kind, weight.format
        weights[key] = weights.get(key, 0) + weight.kept_bytes
        # The mapped file and its copy; then the copy, the planes and the planes in the kernels'
        # order.
        steps = [2 * weight.read_bytes]
        if weight.is_converted_here:
            steps.append(weight.read_bytes + 2 * weight.kept_bytes)
        load_bytes = max(load_bytes, held + max(steps))
        held += weight.kept_bytes if setup.on_cpu else 0
    return Footprint(
        weights={key: size for key, size in weights.items() if size},
        kv_bytes_per_block=setup.config.block_size * _count_kv_bytes(shapes, setup, rank),
        activation_bytes=_estimate_activations(shapes, setup),
        load_bytes=load_bytes,
        state_bytes=shapes.state_bytes_per_row * num_state_rows,
    )


def _list_weights(
    shapes: ModelShapes, checkpoint: Any, low_bit: LowBitSelection
) -> Iterator[_Weight]:
    """Every parameter and stored buffer in the loader's order; a converted head comes last."""

    def weigh(kind: str, tensor: TensorShape, stored: Format | None, target: Format | None) -> Any:
        format = stored or target
        dense_name, itemsize = DTYPES[shapes.dtype]
        dense = prod(tensor.shape) * itemsize
        kept = dense if format is None else format.num_bytes(*tensor.shape)
        return _Weight(
            kind=kind,
            format=dense_name if format is None else format.name,
            read_bytes=dense if stored is None else kept,
            kept_bytes=kept,
            is_converted_here=format is not None,
        )

    def find_stored(name: str) -> Format | None:
        return None if checkpoint is None else checkpoint.low_bit_format(name)

    for tensor in shapes.tensors:
        kind = "embedding" if tensor.name == shapes.embedding_name else _find_kind(tensor.name)
        converts = tensor.is_linear and low_bit.converts_linear(tensor.name.rpartition(".")[0])
        target = low_bit.linears if converts else None
        yield weigh(kind, tensor, find_stored(tensor.name), target)
    stored = find_stored(shapes.head.name)
    is_tied = shapes.text_config.tie_word_embeddings
    if stored is None and low_bit.head is None and is_tied:
        return
    yield weigh("head", shapes.head, stored, low_bit.head)


def _find_kind(name: str) -> str:
    if "norm" in name:
        return "norms"
    if "attn" in name or "attention" in name:
        return "attention"
    if any(part in name for part in ("mlp", "moe", "expert", "feed_forward")):
        return "MLP"
    return "other"


def _count_kv_bytes(shapes: ModelShapes, setup: MemorySetup, rank: int) -> int:
    """Bytes of one token's keys and values over all layers: AutoTP deals heads out in turn."""
    is_int8 = setup.config.kv_cache_dtype == "int8"
    layers = list_layer_configs(shapes.text_config)
    attention_layers = shapes.attention_layers
    num_bytes = 0
    for layer in set(find_kv_sources(shapes.text_config)):
        if attention_layers is not None and layer not in attention_layers:
            continue
        num_heads, key_dim, value_dim = find_kv_heads(layers[layer])
        own_heads = num_heads // setup.num_ranks + (rank < num_heads % setup.num_ranks)
        num_bytes += own_heads * count_head_bytes(key_dim, value_dim, shapes.itemsize, is_int8)
    if num_indexers := count_indexers(shapes.text_config):
        half = shapes.text_config.index_head_dim // 2
        num_bytes += num_indexers * count_head_bytes(half, half, shapes.itemsize, is_int8)
    return num_bytes


def count_loaded(model: Any) -> int:
    """Bytes of the weights of a model that is loaded; a tied head is a view of the embedding."""
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    is_view = hasattr(head, "untyped_storage") and (
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


def _estimate_activations(shapes: ModelShapes, setup: MemorySetup) -> int:
    """Most bytes that one step holds at once, of the steps that a layer consists of.

    Counted are the tensors that transformers' code holds at its widest points: the norm in
    float32; queries, keys and values with the temporaries of their rotation, the context's keys
    and values gathered for one sequence (of int8: codes, and codes times scales in float32) and
    repeated per query head, and its mask; gate, up and
    product of the MLP; logits with a float32 copy for sampling. Not counted: the allocator's
    waste, and what kernels use inside.
    """
    text, size = shapes.text_config, shapes.itemsize
    config, max_model_len = setup.config, setup.max_model_len
    num_tokens, hidden = config.max_num_batched_tokens, text.hidden_size
    queries = keys = 0
    for num_heads, num_kv_heads, head_dim in set(map(find_heads, list_layer_configs(text))):
        own_kv_heads = -(-num_kv_heads // setup.num_ranks)
        queries = max(queries, own_kv_heads * (num_heads // num_kv_heads) * head_dim)
        keys = max(keys, own_kv_heads * head_dim)
    wide = max(
        (
            tensor.shape[0]
            for tensor in shapes.tensors
            if _find_kind(tensor.name) == "MLP" and len(tensor.shape) == 2
        ),
        default=hidden,
    )
    num_rows = min(num_tokens, config.max_num_seqs + MAX_SCORED_ROWS)
    copies = 1 if setup.num_ranks == 1 else 2
    norm = num_tokens * hidden * (2 * size + 8)
    rotation = num_tokens * (2 * hidden + 4 * queries + 4 * keys) * size
    gathered = 5 * keys if config.kv_cache_dtype == "int8" else 0
    context = max_model_len * ((2 * keys + 2 * queries) * size + gathered)
    mask = min(num_tokens, max_model_len) * max_model_len
    attention = num_tokens * (2 * hidden + 2 * queries + 2 * keys) * size + context + mask
    mlp = num_tokens * (2 * hidden + 3 * wide) * size
    num_logits = min(text.vocab_size, setup.num_ranks * shapes.head.shape[0])
    logits = num_rows * num_logits * (copies * size + 4)
    return max(norm, rotation, attention, mlp, logits)

"""What a model consists of, as shapes and sizes. Every rank; no torch, as --plan is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autotp_serving.config import ServingConfig

DTYPES = {"bfloat16": ("bf16", 2), "float16": ("fp16", 2), "float32": ("fp32", 4)}
"""The word for weights left dense, and the bytes of one."""

SCALE_BYTES = 4
"""Of the float32 that a token's key, or value, of one head is multiplied by in an int8 cache."""


def find_dtype_name(config: ServingConfig) -> str:
    """Torch's name for the type of weights that stay dense, and of activations."""
    if config.dtype == "auto":
        return "float16" if config.low_bit == "fp16" else "bfloat16"
    return config.dtype


@dataclass(frozen=True)
class TensorShape:
    """A parameter or stored buffer of one rank; `is_linear` of a linear layer's weight."""

    name: str
    shape: tuple[int, ...]
    is_linear: bool


@dataclass(frozen=True)
class ModelShapes:
    """One rank's model, sharded.

    Attributes:
        text_config: the model's config, or that of its text part.
        tensors: in the order in which they are loaded, without the head's weight.
        embedding_name: which of them is the embedding.
        head: the output head's weight, which a tied one shares with the embedding.
        dtype: torch's name for the type of dense weights and of activations.
        attention_layers: the numbers of those with keys and values; None: all have some.
        state_bytes_per_row: of a sequence's states beside its KV blocks.
    """

    text_config: Any
    tensors: tuple[TensorShape, ...]
    embedding_name: str
    head: TensorShape
    dtype: str
    attention_layers: tuple[int, ...] | None = None
    state_bytes_per_row: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of one dense number."""
        return DTYPES[self.dtype][1]


def list_layer_configs(text_config: Any) -> list[Any]:
    """A config for each layer, where layers differ in their heads; else the model's own."""
    if getattr(text_config, "is_heterogeneous", False):
        return list(text_config.per_layer_config)
    return [text_config] * text_config.num_hidden_layers


def find_heads(layer_config: Any) -> tuple[int, int, int]:
    """Query heads, key/value heads and numbers of a head, of all ranks together."""
    num_heads = layer_config.num_attention_heads
    num_kv_heads = getattr(layer_config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(layer_config, "head_dim", None) or layer_config.hidden_size // num_heads
    return num_heads, num_kv_heads, head_dim


def find_kv_heads(layer_config: Any) -> tuple[int, int, int]:
    """Heads in the cache, of all ranks together, and numbers of a head's key and of its value.

    Latent attention has those of every query head there.
    """
    num_heads, num_kv_heads, head_dim = find_heads(layer_config)
    if getattr(layer_config, "kv_lora_rank", None) is None:
        return num_kv_heads, head_dim, head_dim
    key_dim = layer_config.qk_nope_head_dim + layer_config.qk_rope_head_dim
    return num_heads, key_dim, layer_config.v_head_dim


def count_indexers(text_config: Any) -> int:
    """Layers that choose tokens by keys of their own, `index_head_dim` numbers each."""
    kinds = getattr(text_config, "layer_types", None) or ()
    modes = getattr(text_config, "indexer_types", None) or ["full"] * len(kinds)
    return list(zip(kinds, modes, strict=False)).count(("indexed_attention", "full"))


def find_kv_sources(text_config: Any) -> list[int]:
    """Whose keys and values each layer reads: mostly its own.

    The last layers of some families have none, and read those of the last layer before them that
    is of their type (`num_kv_shared_layers`).
    """
    num_layers = text_config.num_hidden_layers
    num_own = num_layers - (getattr(text_config, "num_kv_shared_layers", None) or 0)
    types = getattr(text_config, "layer_types", None) or [None] * num_layers
    return [
        layer
        if layer < num_own
        else max((one for one in range(num_own) if types[one] == types[layer]), default=layer)
        for layer in range(num_layers)
    ]


def count_head_bytes(key_dim: int, value_dim: int, itemsize: int, is_int8: bool) -> int:
    """Bytes of one token's key and value of one head.

    Args:
        itemsize: bytes of one activation, which the cache holds as they are unless `is_int8`.
    """
    if is_int8:
        return key_dim + value_dim + 2 * SCALE_BYTES
    return (key_dim + value_dim) * itemsize

"""Shapes of the commonest families, from config.json alone and without torch. Rank 0's `--plan`.

To import torch, transformers and DeepSpeed takes seconds, and a plan needs of them only sizes:
those of a decoder layer, and how AutoTP deals them out. A test holds these shapes against the model
that transformers builds and AutoTP shards; whatever is not here is planned by that
(meta_planner.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from autotp_serving.config import ConfigError
from autotp_serving.model.shapes import ModelShapes, TensorShape
from autotp_serving.model.sizes import check_sizes
from autotp_serving.model_folder import read_object

# What a family's config class says where config.json does not. None: as large as another one says.
COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_parameters": None,
    "rope_scaling": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": COMMON | {"num_key_value_heads": 8},
    "qwen2": COMMON | {"num_key_value_heads": 32},
    "qwen3": COMMON | {"num_key_value_heads": 32, "head_dim": 128},
    "phi3": COMMON | {"original_max_position_embeddings": 4096},
    "gemma2": COMMON | {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    "gpt_neox": COMMON | {"attention_bias": True},
}
ROPE_NAMES = ("rope_parameters", "rope_scaling")
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)

GRAIN = 64
"""DeepSpeed's `tp_grain_size`, as it is unless told otherwise."""


def read_known_config(folder: Path) -> Any:
    """Read config.json as far as sizes go.

    Returns:
        What stands in for transformers' config, or None: another family, or anything that only
        transformers can judge.

    Raises:
        ConfigError: sizes that no model has.
    """
    try:
        found = read_object(folder / "config.json")
        settings = DEFAULTS[found["model_type"]] | found
    except (ConfigError, KeyError, TypeError):
        return None
    if any(not isinstance(settings[name] or {}, dict) for name in ROPE_NAMES):
        return None
    if "auto_map" in found or any(type(settings.get(name)) is not int for name in REQUIRED):
        return None
    check_sizes(found)
    config = SimpleNamespace(**settings)
    if config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_attention_heads
    if config.head_dim is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    config.get_text_config = lambda: config
    return config


def list_known_shapes(config: Any, rank: int, num_ranks: int, dtype: str) -> ModelShapes:
    """The shapes of one rank's model.

    Args:
        config: of `read_known_config`.
        dtype: torch's name for the type of dense weights.
    """
    list_tensors = _list_neox if config.model_type == "gpt_neox" else _list_llama
    embedding_name, *tensors = list_tensors(config, rank, num_ranks)
    vocab, hidden = config.vocab_size, config.hidden_size
    num_rows = vocab * (rank + 1) // num_ranks - vocab * rank // num_ranks
    return ModelShapes(
        text_config=config,
        tensors=(TensorShape(embedding_name, (vocab, hidden), False), *tensors),
        embedding_name=embedding_name,
        head=TensorShape("lm_head.weight", (num_rows, hidden), False),
        dtype=dtype,
    )


def list_known_names(config: Any) -> set[str]:
    """The names under which checkpoints hold the tensors of these shapes.

    Args:
        config: of `read_known_config`.
    """
    shapes = list_known_shapes(config, 0, 1, "bfloat16")
    names = {tensor.name for tensor in shapes.tensors} | {shapes.head.name, "embed_out.weight"}
    if config.model_type != "phi3":
        return names
    fused = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
    return names | {
        name.replace(part, whole) for name in names for part, whole in fused.items() if part in name
    }


def _list_llama(config: Any, rank: int, num_ranks: int) -> Iterator[Any]:
    """Llama and those that differ from it by biases and norms."""
    family, hidden = config.model_type, config.hidden_size
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    own_kv_heads = _share(kv_heads, rank, num_ranks)
    keys = own_kv_heads * head_dim
    queries = config.num_attention_heads * head_dim * own_kv_heads // kv_heads
    wide = _share_grains(config.intermediate_size, rank, num_ranks)
    qkv_bias = family == "qwen2" or (family in ("llama", "qwen3") and config.attention_bias)
    out_bias = family in ("llama", "qwen3") and config.attention_bias
    mlp_bias = family == "llama" and config.mlp_bias
    layer_norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "gemma2":
        layer_norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    yield "model.embed_tokens.weight"
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        yield from _linear(f"{attention}.q_proj", queries, hidden, qkv_bias)
        yield from _linear(f"{attention}.k_proj", keys, hidden, qkv_bias)
        yield from _linear(f"{attention}.v_proj", keys, hidden, qkv_bias)
        yield from _linear(f"{attention}.o_proj", hidden, queries, out_bias)
        if family == "qwen3":
            yield TensorShape(f"{attention}.q_norm.weight", (head_dim,), False)
            yield TensorShape(f"{attention}.k_norm.weight", (head_dim,), False)
        yield from _linear(f"{mlp}.gate_proj", wide, hidden, mlp_bias)
        yield from _linear(f"{mlp}.up_proj", wide, hidden, mlp_bias)
        yield from _linear(f"{mlp}.down_proj", hidden, wide, mlp_bias)
        for name in layer_norms:
            yield TensorShape(f"{layer}.{name}.weight", (hidden,), False)
    yield TensorShape("model.norm.weight", (hidden,), False)


def _list_neox(config: Any, rank: int, num_ranks: int) -> Iterator[Any]:
    """GPT-NeoX: queries, keys and values by one matrix, head by head; biases everywhere."""
    hidden = config.hidden_size
    heads = config.num_attention_heads
    queries = hidden * _share(heads, rank, num_ranks) // heads
    wide = _share_grains(config.intermediate_size, rank, num_ranks)
    bias = config.attention_bias
    yield "gpt_neox.embed_in.weight"
    for number in range(config.num_hidden_layers):
        layer = f"gpt_neox.layers.{number}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield from _norm(f"{layer}.{name}", hidden)
        yield from _linear(f"{layer}.attention.query_key_value", 3 * queries, hidden, bias)
        yield from _linear(f"{layer}.attention.dense", hidden, queries, bias)
        yield from _linear(f"{layer}.mlp.dense_h_to_4h", wide, hidden, True)
        yield from _linear(f"{layer}.mlp.dense_4h_to_h", hidden, wide, True)
    yield from _norm("gpt_neox.final_layer_norm", hidden)


def _linear(name: str, rows: int, cols: int, has_bias: bool) -> Iterator[TensorShape]:
    yield TensorShape(f"{name}.weight", (rows, cols), True)
    if has_bias:
        yield TensorShape(f"{name}.bias", (rows,), False)


def _norm(name: str, size: int) -> Iterator[TensorShape]:
    for attribute in ("weight", "bias"):
        yield TensorShape(f"{name}.{attribute}", (size,), False)


def _share_grains(size: int, rank: int, num_ranks: int) -> int:
    """AutoTP's part of an MLP: in grains of 64, and the rest of them to the last rank."""
    if size < GRAIN:
        return _share(size, rank, num_ranks)
    rest = size % GRAIN if rank == num_ranks - 1 else 0
    return _share(size // GRAIN, rank, num_ranks) * GRAIN + rest


def _share(size: int, rank: int, num_ranks: int) -> int:
    """AutoTP's part of `size` equal things: the first ranks take one more each."""
    return size // num_ranks + (rank < size % num_ranks)

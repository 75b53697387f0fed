"""Which architectures are served, at how many ranks, and what is refused by name. Every rank.

A family in PROVED gives the tokens of transformers itself at one and at several ranks
(tests/ranks/test_families.py). Another one is served only if nothing in it is left to guessing:
AutoTP has cut exactly the layers whose names say how, and every layer attends through our pages.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any

from autotp_serving.config import ConfigError, ServingConfig

if TYPE_CHECKING:  # --plan asks here before torch could be imported
    from torch import nn

PROVED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi3",
    "gpt_neox",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)

COLUMN_NAMES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_NAMES = ("o_proj", "down_proj")

# Rotary embeddings that depend on how long a sequence is, beyond the length of their training:
# they cannot differ between the sequences of one batch.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def check_heads(model_config: Any, num_ranks: int) -> None:
    """Refuse more ranks than there are key/value heads to give them.

    Raises:
        ConfigError: with both numbers.
    """
    text_config = model_config.get_text_config()
    num_kv_heads = (
        getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    )
    if num_ranks > num_kv_heads:
        raise ConfigError(
            f"{num_ranks} ranks cannot share the {num_kv_heads} key/value heads of this model: "
            f"start at most {num_kv_heads} ranks"
        )


def check_sharding(model: nn.Module) -> None:
    """Refuse an unproved family in which AutoTP has cut what cannot be checked, or cut it wrongly.

    Args:
        model: cut for several ranks, on the meta device.

    Raises:
        ConfigError: naming the family and the layer.
    """
    from torch import nn

    family = model.config.model_type
    if family in PROVED:
        return
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        is_matrix = weight is not None and weight.dim() > 1 and not isinstance(module, nn.Embedding)
        if module is head or not (is_matrix or has_stacked_weights(module)):
            continue
        last = name.rpartition(".")[2]
        expected = "LinearLayer" if last in COLUMN_NAMES else "LinearAllreduce"
        if last not in (*COLUMN_NAMES, *ROW_NAMES) or type(module).__name__ != expected:
            raise ConfigError(
                f"the family '{family}' is not known to be split rightly over several ranks "
                f"({name} is a {type(module).__name__}): start 1 rank, or one of "
                f"{', '.join(PROVED)}"
            )


def has_stacked_weights(module: nn.Module) -> bool:
    """True for several matrices in one parameter, such as all experts of a layer."""
    return any(parameter.dim() > 2 for parameter in module.parameters(recurse=False))


def check_attention(model: nn.Module, layers: set[int]) -> None:
    """Refuse a model with layers that keep their state elsewhere than in our pages.

    Args:
        layers: those that wrote keys and values in a first forward pass.

    Raises:
        ConfigError: naming the family.
    """
    config = model.config.get_text_config()
    missing = sorted(set(range(config.num_hidden_layers)) - layers)
    if missing:
        raise ConfigError(
            f"the family '{model.config.model_type}' cannot be served: its layers {missing[:8]} do "
            "not attend through transformers' AttentionInterface"
        )


def check_config_age(model_config: Any) -> None:
    """Refuse a config.json whose rotary settings an older transformers would pass over in silence.

    Raises:
        ConfigError: with both versions.
    """
    written = getattr(model_config, "rope_parameters", None)
    version = metadata.version("transformers")
    if written is not None and int(version.split(".")[0]) < 5:
        raise ConfigError(
            "config.json has its rotary settings under 'rope_parameters', as transformers 5 writes "
            f"them, and transformers {version} does not read them there: use "
            "transformers 5, or the checkpoint's original config.json"
        )


def find_length_limit(model_config: Any) -> int:
    """Most tokens that a sequence may have."""
    config = model_config.get_text_config()
    limit = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in LENGTH_DEPENDENT_ROPE:
        trained = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        return min(limit, trained or limit)
    return limit


def find_max_model_len(config: ServingConfig, model_config: Any) -> int:
    """The asked length, or the model's own limit.

    Raises:
        ConfigError: more is asked than the model was made for.
    """
    limit = find_length_limit(model_config)
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is over the model's own limit of {limit}"
        )
    return config.max_model_len

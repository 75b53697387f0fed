"""Are the sizes in a config.json those of a model? Every rank; no torch, as --plan is quick.

transformers believes any number: a negative one ends in torch, a huge one in hours of building.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autotp_serving.config import ConfigError

SIZE_LIMITS = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**20),
    "intermediate_size": (1, 2**24),
    "moe_intermediate_size": (1, 2**24),
    "shared_expert_intermediate_size": (0, 2**24),
    "num_hidden_layers": (1, 2**10),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (1, 2**14),
    "head_dim": (1, 2**16),
    "max_position_embeddings": (1, 2**31 - 1),
    "max_seq_len": (1, 2**31 - 1),
    "seq_length": (1, 2**31 - 1),
    "original_max_position_embeddings": (1, 2**31 - 1),
    "num_experts": (0, 2**12),
    "num_local_experts": (0, 2**12),
    "n_routed_experts": (0, 2**12),
    "num_experts_per_tok": (0, 2**12),
}
"""Least and most of each; what is published stays under a tenth of the most."""

TEXT_PARTS = ("text_config", "llm_config", "language_config")


def check_sizes(settings: Mapping[str, Any]) -> None:
    """Refuse sizes that no model has, in the text part too.

    Args:
        settings: of a config.json. What is not there is not judged: families have defaults.

    Raises:
        ConfigError: naming the setting and its value.
    """
    for name, (least, most) in SIZE_LIMITS.items():
        value = settings.get(name)
        for one in value if isinstance(value, list) else [value]:
            # A bool is an int to Python, and not to a reader.
            if one is not None and (type(one) is not int or not least <= one <= most):
                raise ConfigError(
                    f"config.json: {name} is {repr(one)[:40]}, which must be a whole number from "
                    f"{least} to {most}: download the checkpoint again"
                )
    _check_heads_divide(settings)
    for name in TEXT_PARTS:
        part = settings.get(name)
        if isinstance(part, Mapping):
            check_sizes(part)


def check_loaded_sizes(model_config: Any) -> None:
    """The same of a config as transformers has read it, where families have names of their own."""
    text = model_config.get_text_config()
    check_sizes({name: getattr(text, name, None) for name in SIZE_LIMITS})


def _check_heads_divide(settings: Mapping[str, Any]) -> None:
    heads, kv_heads = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    if not isinstance(heads, int):
        return
    if isinstance(kv_heads, int) and heads % kv_heads:
        raise ConfigError(
            f"config.json: {heads} attention heads cannot share {kv_heads} key/value heads evenly: "
            "download the checkpoint again"
        )
    hidden = settings.get("hidden_size")
    if isinstance(hidden, int) and settings.get("head_dim") is None and hidden < heads:
        raise ConfigError(
            f"config.json: hidden_size {hidden} leaves nothing for each of {heads} attention "
            "heads: download the checkpoint again"
        )

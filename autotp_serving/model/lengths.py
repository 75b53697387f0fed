"""How long a sequence may be, and rotary embeddings that depend on it. Every rank.

The limit is the one that vLLM derives from config.json: the longest sequence of the training, times
what its rotary embedding stretches it by. Two kinds of rotary embedding have other frequencies for
longer sequences. All sequences of a batch share one set, and a token's text may not depend on its
neighbours, so that set is chosen once, for the longest sequence that is served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autotp_serving.config import ConfigError, ServingConfig

if TYPE_CHECKING:  # --plan asks here before torch could be imported
    from torch import nn

LENGTH_NAMES = ("max_position_embeddings", "max_seq_len", "seq_length", "max_target_positions")
ORIGINAL_NAME = "original_max_position_embeddings"

MAX_LEN = 2**31 - 1
MAX_FACTOR = 2.0**16

LENGTH_DEPENDENT = ("dynamic", "longrope", "su")
"""Rotary embeddings with other frequencies beyond the length of their training."""

STRETCHED_ALREADY = ("gemma3", "gemma3_text")
"""Families whose max_position_embeddings is what their rotary factor makes of the training."""


@dataclass(frozen=True)
class Length:
    """How long the sequences of a model may be.

    Attributes:
        limit: most tokens that are served.
        kind: of the rotary embedding.
        trained: tokens up to which its frequencies are those of the training; None if they are
            always the same.
        named: most tokens that config.json tells of, where that is more than the limit.
    """

    limit: int
    kind: str = "default"
    trained: int | None = None
    named: int | None = None


def find_length(model_config: Any) -> Length:
    """How long a sequence may be, from a config.json as it is or as transformers has read it.

    Raises:
        ConfigError: no length, or settings that make none.
    """
    config = model_config.get_text_config()
    limit = next(filter(None, (getattr(config, name, None) for name in LENGTH_NAMES)), None)
    if limit is None:
        raise ConfigError(
            f"the family '{model_config.model_type}' cannot be served: its config.json names no "
            "longest sequence (max_position_embeddings)"
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if any(isinstance(part, Mapping) for part in rope.values()):
        return _find_nested(rope, limit)
    original = _read_original(config, rope) or limit
    if kind in ("su", "longrope"):
        return Length(limit, "longrope", min(limit, original))
    if kind not in ("linear", "dynamic", "yarn") or config.model_type in STRETCHED_ALREADY:
        return Length(limit, str(kind))
    factor = _read_factor(rope)
    trained = original if kind == "yarn" else limit
    if kind == "yarn" and factor is None:
        return Length(limit, kind)
    stretched = min(MAX_LEN, int(trained * (factor or 1.0)))
    return Length(stretched, kind, trained if kind == "dynamic" else None)


def _find_nested(rope: Mapping[str, Any], limit: int) -> Length:
    """That of a family whose layers differ in their rotary embeddings."""
    parts = [part for part in rope.values() if isinstance(part, Mapping)]
    for part in parts:
        kind = part.get("rope_type", part.get("type"))
        if kind in LENGTH_DEPENDENT:
            trained = min(limit, _read_original(None, part) or limit)
            return Length(trained, kind, trained, named=limit)
    return Length(limit, "of several kinds")


def _read_original(config: Any, rope: Mapping[str, Any]) -> int | None:
    """Tokens of a sequence in training. Phi-3 has the number beside the rotary settings."""
    found = getattr(config, ORIGINAL_NAME, None) or rope.get(ORIGINAL_NAME)
    if found is not None and (type(found) is not int or not 1 <= found <= MAX_LEN):
        raise ConfigError(
            f"config.json: {ORIGINAL_NAME} is {found!r:.40}: download the checkpoint again"
        )
    return found


def _read_factor(rope: Mapping[str, Any]) -> float | None:
    factor = rope.get("factor")
    if factor is None:
        return None
    if type(factor) not in (int, float) or not 1.0 <= factor <= MAX_FACTOR:
        raise ConfigError(
            f"config.json: the rotary embedding's factor is {factor!r:.40}, which must be a number "
            f"from 1 to {MAX_FACTOR:g}: download the checkpoint again"
        )
    return float(factor)


def find_max_model_len(config: ServingConfig, model_config: Any) -> int:
    """The asked length, or the model's own limit.

    Raises:
        ConfigError: more is asked than the model was made for.
    """
    length = find_length(model_config)
    if config.max_model_len is None:
        return length.limit
    if config.max_model_len > length.limit:
        reason = "" if length.named is None else f" ({_describe_part(length)})"
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is over the model's own limit of "
            f"{length.limit}{reason}"
        )
    return config.max_model_len


def describe_length(model_config: Any, max_model_len: int) -> str | None:
    """What is to be said of a model's rotary embedding, in one line; None if nothing is."""
    length = find_length(model_config)
    if length.named is not None and length.named > length.limit:
        return f"Sequences may have {length.limit} tokens: {_describe_part(length)}"
    if length.trained is not None and max_model_len > length.trained:
        return (
            f"The model's rotary embedding ({length.kind}) changes beyond {length.trained} tokens: "
            f"every sequence has the frequencies of one of {max_model_len} (--max-model-len); "
            f"with {length.trained} or less, those of the training"
        )
    return None


def _describe_part(length: Length) -> str:
    return (
        f"beyond them the rotary embedding of some layers ({length.kind}) changes with the length "
        f"of each sequence, which a batch cannot follow, so the {length.named} that config.json "
        "names are not served"
    )


def fix_rotary(model: nn.Module, max_model_len: int) -> None:
    """Give rotary embeddings that follow the length of a sequence the frequencies of the longest.

    They come out as transformers computes them for a sequence of `max_model_len` tokens, and are
    computed no more.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if not isinstance(kind, str) or kind not in LENGTH_DEPENDENT:
            continue
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies = module.inv_freq
        fixed, scaling = ROPE_INIT_FUNCTIONS[kind](
            module.config, frequencies.device, seq_len=max_model_len
        )
        module.inv_freq = fixed.to(frequencies.dtype)
        module.attention_scaling = scaling
        module.rope_type = "default"  # what transformers recomputes before each pass, by this name

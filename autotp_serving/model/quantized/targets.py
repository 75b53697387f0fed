"""What each quantized weight becomes: its own format here, or what the command line asks for. Every
rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.low_bit.formats import Format, LowBitError, find_format
from autotp_serving.low_bit.selection import AUTO_HEAD, ROUTERS
from autotp_serving.model.quantized.weight import QuantizedWeight

HEADS = ("lm_head", "embed_out")
EMBEDDINGS = ("embed_tokens", "embed_in", "wte")

Targets = Mapping[str, Format | None]
"""By the weight's name; None: plain numbers in the type of activations."""


def choose_targets(weights: Mapping[str, QuantizedWeight], config: ServingConfig | None) -> Targets:
    """The format of each weight.

    Args:
        config: what was asked for; None asks for nothing.

    Raises:
        ConfigError: a format that there is not.
    """
    try:
        return {name: _choose(name, weight, config) for name, weight in weights.items()}
    except LowBitError as error:
        raise ConfigError(f"--low-bit: {error}") from error


def _choose(name: str, weight: QuantizedWeight, config: ServingConfig | None) -> Format | None:
    module = name.removesuffix(".weight")
    if module.endswith((*ROUTERS, *EMBEDDINGS)):
        return None
    own = weight.format or weight.fallback
    if config is None:
        return own
    if any(part in module for part in config.modules_to_not_convert):
        return None
    if module.endswith(HEADS):
        return own if config.lm_head_low_bit == AUTO_HEAD else find_format(config.lm_head_low_bit)
    return own if config.low_bit is None else find_format(config.low_bit)


def describe_targets(weights: Mapping[str, QuantizedWeight], targets: Targets) -> list[str]:
    """What becomes of the weights, in a phrase for each format: those kept as they are first."""
    counts = Counter(
        (
            target.name if target else "16 bits",
            target is not None and target is weights[name].format,
        )
        for name, target in targets.items()
    )
    phrases = []
    for (name, is_own), count in sorted(counts.items(), key=lambda item: (not item[0][1], item[0])):
        how = "as they are" if is_own or name == "16 bits" else "converted again"
        phrases.append(f"{count} as {name}, {how}" if name != "16 bits" else f"{count} decoded")
    return phrases

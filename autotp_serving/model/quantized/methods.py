"""Which tensors of a folder make up quantized weights, by the method that its settings name. Every
rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from autotp_serving.model.quantized.awq import find_awq_weights
from autotp_serving.model.quantized.bitsandbytes import find_bitsandbytes_weights
from autotp_serving.model.quantized.compressed_tensors import find_compressed_weights
from autotp_serving.model.quantized.fp8 import (
    ACTIVATION_NAMES,
    find_fp8_weights,
    find_modelopt_weights,
)
from autotp_serving.model.quantized.gptq import find_gptq_weights
from autotp_serving.model.quantized.ipex_llm import find_ipex_llm_weights, find_merged_parts
from autotp_serving.model.quantized.mxfp4 import find_mxfp4_weights
from autotp_serving.model.quantized.settings import Quantization
from autotp_serving.model.quantized.weight import QuantizedWeight, Read
from autotp_serving.model.stored_tensors import StoredTensor

Find = Callable[[Quantization, dict[str, StoredTensor], Read], dict[str, QuantizedWeight]]


def find_auto_round_weights(
    quantization: Quantization, stored: dict[str, StoredTensor], read: Read
) -> dict[str, QuantizedWeight]:
    """AutoRound packs as GPTQ does, or as AWQ."""
    packing = quantization.settings.get("packing_format")
    find = find_awq_weights if packing in AWQ_PACKINGS else find_gptq_weights
    return find(quantization, stored, read)


FINDERS: dict[str, Find] = {
    "fp8": find_fp8_weights,
    "fbgemm_fp8": find_fp8_weights,
    "compressed-tensors": find_compressed_weights,
    "gptq": find_gptq_weights,
    "auto-round": find_auto_round_weights,
    "awq": find_awq_weights,
    "bitsandbytes": find_bitsandbytes_weights,
    "modelopt": find_modelopt_weights,
    "ipex-llm": find_ipex_llm_weights,
    "mxfp4": find_mxfp4_weights,
}

AWQ_PACKINGS = ("awq", "auto_round:auto_awq")

CACHE_NAMES = (
    *("k_scale", "v_scale", "q_scale", "kv_scale", "k_zero_point", "v_zero_point"),
    *("prob_scale", "prob_output_scale", "output_scale"),
)
"""Scales for a KV cache, or an attention, in float8."""


@dataclass(frozen=True)
class QuantizedTensors:
    """What a folder's tensors come to.

    Attributes:
        weights: by the name that the model has for each, `X.weight`.
        unneeded: names of stored tensors without a use here, by the reason.
        views: names of tensors that are rows of others: which, the first row and the end.
    """

    weights: dict[str, QuantizedWeight]
    unneeded: dict[str, set[str]] = field(default_factory=dict)
    views: dict[str, tuple[str, int, int]] = field(default_factory=dict)

    @property
    def consumed(self) -> set[str]:
        """Stored tensors that are no tensors of the model."""
        parts = {part for weight in self.weights.values() for part in weight.parts}
        return parts.union(*self.unneeded.values()) - self.weights.keys()


def find_quantized_tensors(
    quantization: Quantization, stored: dict[str, StoredTensor], read: Read
) -> QuantizedTensors:
    """Join the tensors of a folder into weights.

    Args:
        read: for the few bytes that describe others; no weight is read.

    Raises:
        ConfigError: settings, types or shapes that are not read here; in one line.
    """
    weights = FINDERS[quantization.method](quantization, stored, read)
    modules = {name.rpartition(".")[0] for name in weights}
    reasons = {
        "scales of activations in 8 bits, which stay in 16 here": _select(
            stored, ACTIVATION_NAMES, modules
        ),
        "scales of a KV cache in float8, which is not one here": _select(stored, CACHE_NAMES, None),
    }
    views = {}
    if quantization.method == "ipex-llm":
        views = find_merged_parts(quantization, stored)
    unneeded = {reason: names for reason, names in reasons.items() if names}
    return QuantizedTensors(weights, unneeded, views)


def _select(
    stored: Iterable[str], last_names: tuple[str, ...], modules: set[str] | None
) -> set[str]:
    """Tensors of such last names; of some modules only, or of any."""
    found = set()
    for name in stored:
        module, _, last = name.rpartition(".")
        if last in last_names and (modules is None or module in modules):
            found.add(name)
    return found

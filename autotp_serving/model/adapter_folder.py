"""LoRA adapters as PEFT saves them: what a folder says, and what of it is not served. No torch.

On rank 0, and in the head before the ranks start.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_serving.model.stored_tensors import FLOATS, StoredTensor, read_stored_tensors
from autotp_serving.model_folder import ModelFolderError, find_file, read_object
from autotp_serving.request import AdapterError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

MAX_ALPHA = 2.0**16

HEEDED = ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "init_lora_weights", "bias")
"""Settings that are read here."""

HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "runtime_config"),
)
"""Settings that tell of training, or that the names of the tensors tell as well."""

PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Of training; others alter the model's own weights as well."""

TENSOR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter's folder, checked as far as that goes without the model.

    Attributes:
        weights: the file of its tensors.
        scale: what its product is multiplied by.
        tensors: by module name and matrix: A [rank, in_features], B [out_features, rank].
    """

    weights: Path
    scale: float
    tensors: dict[tuple[str, str], StoredTensor]


def read_adapter_folder(folder: Path, max_rank: int) -> AdapterFolder:
    """Read what the folder says.

    Raises:
        AdapterError: it is no folder of an adapter, or one of a kind that is not served, named.
    """
    try:
        if not (folder / CONFIG_NAME).exists():
            raise AdapterError(f"{folder} has no {CONFIG_NAME}: name a folder as PEFT saves it")
        config = read_object(find_file(folder, CONFIG_NAME))
        rank, scale = _read_settings(folder, config, max_rank)
        if not (folder / WEIGHTS_NAME).exists() and list(folder.glob("adapter_model.bin")):
            raise AdapterError(
                f"{folder} holds pickled weights (adapter_model.bin), which can run code when "
                "loaded: save the adapter as safetensors"
            )
        if not (folder / WEIGHTS_NAME).exists():
            raise AdapterError(f"{folder} has no {WEIGHTS_NAME}: name a folder as PEFT saves it")
        weights = find_file(folder, WEIGHTS_NAME)
        tensors = _find_pairs(read_stored_tensors(weights), weights)
    except (ModelFolderError, OSError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(" ".join(str(error).split())[:300]) from error
    for (name, matrix), tensor in tensors.items():
        found = tensor.shape[0 if matrix == "A" else 1]
        if found != rank:
            raise AdapterError(f"{weights}: {name} has rank {found}, and {CONFIG_NAME} says {rank}")
    return AdapterFolder(weights, scale, tensors)


def _read_settings(folder: Path, config: Mapping[str, Any], max_rank: int) -> tuple[int, float]:
    """The rank, and what products are multiplied by."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder}: peft_type {config.get('peft_type')!r:.40} is not served, only 'LORA'"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterError(f"{folder}: task_type {config['task_type']!r:.40} is not served")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{folder}: bias {config['bias']!r:.40} is not served, only 'none'")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise AdapterError(
            f"{folder}: init_lora_weights {config['init_lora_weights']!r:.40} alters the model's "
            "own weights: convert the adapter to plain LoRA (save_pretrained in PEFT does, with "
            "path_initial_model_for_weight_conversion)"
        )
    for key, value in config.items():
        if value and key not in (*HEEDED, *HARMLESS):
            raise AdapterError(f"{folder}: {key} ({value!r:.60}) is not served")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"{folder}: r must be a whole number above 0, not {rank!r:.40}")
    if rank > max_rank:
        raise AdapterError(f"{folder}: rank {rank} is above {max_rank} (--max-lora-rank)")
    if type(alpha) not in (int, float) or not 0 < abs(alpha) <= MAX_ALPHA:
        raise AdapterError(f"{folder}: lora_alpha must be a number, not {alpha!r:.40}")
    if config.get("use_rslora", False) not in (True, False):
        raise AdapterError(f"{folder}: use_rslora must be true or false")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _find_pairs(
    stored: Mapping[str, StoredTensor], weights: Path
) -> dict[tuple[str, str], StoredTensor]:
    """The matrices by module name; of each there are two."""
    found = {}
    for key, tensor in stored.items():
        match = TENSOR_NAME.fullmatch(key)
        if match is None:
            raise AdapterError(f"{weights}: {key[:200]} is not served, only lora_A and lora_B of "
                               "linear layers")  # fmt: skip
        if tensor.dtype not in FLOATS or len(tensor.shape) != 2:
            raise AdapterError(f"{weights}: {key[:200]} is {tensor.dtype} {list(tensor.shape)}")
        if found.setdefault((match[1], match[2]), tensor) is not tensor:
            raise AdapterError(f"{weights} holds {match[1]} twice")
    if not found:
        raise AdapterError(f"{weights} holds no tensors")
    for name, matrix in found:
        if (name, "B" if matrix == "A" else "A") not in found:
            raise AdapterError(f"{weights}: {name} has lora_{matrix} alone")
    return found

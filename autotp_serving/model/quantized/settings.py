"""Whether a folder says that its weights are quantized, and how. Every rank; no torch, for --plan.

Most producers write `quantization_config` into config.json, older ones a file of their own beside
it. A method that is not read here is refused by name: its tensors would be taken for weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_serving.config import ConfigError
from autotp_serving.model_folder import read_object

CONFIG_KEYS = ("quantization_config", "compression_config")
TEXT_PARTS = ("text_config", "llm_config", "language_config")

# Files beside config.json, the method that each stands for, and the key that holds its settings.
SIDE_FILES = (
    ("quantize_config.json", "gptq", None),
    ("quant_config.json", "awq", None),
    ("quantization_config.json", "auto-round", None),
    ("hf_quant_config.json", "modelopt", "quantization"),
)
IPEX_LLM_KEY = "bigdl_transformers_low_bit"
IPEX_LLM_FILE = "bigdl_config.json"

METHODS = (
    *("fp8", "fbgemm_fp8", "modelopt", "compressed-tensors"),
    *("gptq", "auto-round", "awq", "bitsandbytes", "mxfp4", "ipex-llm"),
)
"""What is read; `quant_method` in a config."""

ALIASES = {"intel/auto-round": "auto-round", "auto_round": "auto-round"}

CURE = "get the 16-bit original, which --low-bit converts while it loads"


@dataclass(frozen=True)
class Quantization:
    """What a folder says of its weights.

    Attributes:
        method: who made them so, one of METHODS.
        settings: as they stand in the file.
        source: the file, for messages.
    """

    method: str
    settings: dict[str, Any]
    source: Path

    def refuse(self, reason: str, cure: str = CURE) -> ConfigError:
        """The error that names the file, the reason and the way out."""
        return ConfigError(f"{self.source}: {reason}: {cure}")

    def get(self, name: str, default: Any, accept: Callable[[Any], bool]) -> Any:
        """One setting.

        Args:
            accept: whether a value can be used.

        Raises:
            ConfigError: it cannot.
        """
        value = self.settings.get(name, default)
        if not accept(value):
            raise self.refuse(f"{name} {value!r:.60} is not read here")
        return value


def find_quantization(folder: Path) -> Quantization | None:
    """Read what the folder says; None for plain 16- and 32-bit weights.

    Raises:
        ConfigError: a method that is not read here.
    """
    found = _find_settings(folder)
    if found is not None and found.method not in METHODS:
        raise found.refuse(
            f"its weights are quantized by {found.method!r:.60}, which is not read here "
            f"(read are {', '.join(METHODS) or 'none'})"
        )
    return found


def _find_settings(folder: Path) -> Quantization | None:
    path = folder / "config.json"
    config = read_object(path) if path.exists() else {}
    for part in (config, *(config.get(name) for name in TEXT_PARTS)):
        for key in CONFIG_KEYS:
            settings = part.get(key) if isinstance(part, dict) else None
            if settings is not None:
                return _judge(path, key, settings, None)
    side = folder / IPEX_LLM_FILE
    for file, values in ((path, config), (side, read_object(side) if side.exists() else {})):
        if values.get(IPEX_LLM_KEY):
            return Quantization("ipex-llm", {"low_bit": values[IPEX_LLM_KEY]}, file)
    for name, method, key in SIDE_FILES:
        if (folder / name).exists():
            found = read_object(folder / name)
            settings = found if key is None else found.get(key)
            return _judge(folder / name, key or name, settings, method)
    return None


def _judge(path: Path, key: str, settings: Any, default: str | None) -> Quantization:
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: {key} must be an object: download it again")
    method = settings.get("quant_method", default)
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    return Quantization(ALIASES.get(str(method), str(method)), settings, path)


def drop_quantization(folder: Path) -> None:
    """Take out of a folder that was saved here what its source said of other people's layouts."""
    path = folder / "config.json"
    config = read_object(path)
    for part in (config, *(config.get(name) for name in TEXT_PARTS)):
        if isinstance(part, dict):
            for key in (*CONFIG_KEYS, IPEX_LLM_KEY):
                part.pop(key, None)
    path.unlink()  # a copy may have the permissions of its source
    path.write_text(json.dumps(config, indent=2) + "\n")
    for name in (IPEX_LLM_FILE, *(name for name, _, _ in SIDE_FILES)):
        (folder / name).unlink(missing_ok=True)

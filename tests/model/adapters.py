"""LoRA adapters as PEFT saves them, and models that they are merged into."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def save_adapter(
    model_folder: Path, folder: Path, targets: Sequence[str], rank: int, **settings: Any
) -> Path:
    """Save a random adapter for all layers whose names end with one of the targets.

    Args:
        settings: of adapter_config.json, beside or in place of PEFT's.
    """
    config = transformers.AutoConfig.from_pretrained(model_folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(sum(folder.name.encode()))
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(tuple(targets)) and isinstance(module, torch.nn.Linear):
            for matrix, shape, std in (
                ("A", (rank, module.in_features), module.in_features**-0.5),
                ("B", (module.out_features, rank), 0.4 * rank**-0.5),
            ):
                key = f"base_model.model.{name}.lora_{matrix}.weight"
                tensors[key] = std * torch.randn(shape, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model_folder),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "target_modules": list(targets),
        "bias": "none",
        "rank_pattern": {},
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written | settings))
    return folder


def merge_adapter(model_folder: Path, adapter: Path, folder: Path) -> Path:
    """Save the model with the adapter's products added to its weights, in float32."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    divisor = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder).float()
    for key, down in tensors.items():
        if ".lora_A." in key:
            up = tensors[key.replace(".lora_A.", ".lora_B.")]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = model.get_submodule(name).weight.data
            weight += config["lora_alpha"] / divisor * up.float() @ down.float()
    model.save_pretrained(folder)
    return folder

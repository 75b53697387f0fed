"""Writes tiny random gpt-oss checkpoints: in 16 bits as transformers does, and in MXFP4.

The numbers that MXFP4 codes mean are computed here by the format's own rule, not by code of ours.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from autotp_serving.model.stored_tensors import SINGLE_NAME
from tests.model.checkpoints import save_byte_tokenizer

SETTINGS: dict[str, Any] = {
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "intermediate_size": 224,  # three ranks share it unevenly, and its last block is not full
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "sliding_window": 24,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Saved:
    """Attributes: folder: the checkpoint; reference: the float32 model that it means; meant: the
    stacks of that, [experts, rows, columns], by name."""

    folder: Path
    reference: Path
    meant: dict[str, Tensor]


def save_gpt_oss(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a random checkpoint as transformers writes it."""
    config = transformers.GptOssConfig(**SETTINGS)
    torch.manual_seed(16)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_bias = name.endswith(("bias", "sinks"))
            if parameter.dim() == 1 or is_bias:
                parameter.normal_(std=0.3).add_(0.0 if is_bias else 1.0)
    model.to(dtype).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def write_mxfp4(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks, scales and what they mean, of float32 `[experts, rows, columns]`."""
    groups = stack.unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True))) - 2
    scaled = groups / torch.exp2(exponents)
    codes = (scaled.abs().unsqueeze(-1) - torch.tensor(LEVELS)).abs().argmin(-1)
    meant = torch.tensor(LEVELS)[codes] * scaled.sign() * torch.exp2(exponents)
    codes += 8 * (scaled < 0)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    scales = (exponents.squeeze(-1) + 127).to(torch.uint8)
    return blocks, scales, meant.flatten(-2)


def save_mxfp4(root: Path) -> Saved:
    """Save a checkpoint as the hub has them, and beside it the float32 model that it means."""
    folder, reference = root / "mxfp4", save_gpt_oss(root / "reference", torch.float32)
    tensors = load_file(reference / SINGLE_NAME)
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales, meant[name] = write_mxfp4(tensor.transpose(1, 2).contiguous())
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            stored[name] = tensor.bfloat16()
            tensors[name] = stored[name].float()
    tensors |= {name: stack.transpose(1, 2).contiguous() for name, stack in meant.items()}
    shutil.copytree(reference, folder)
    save_file(tensors, reference / SINGLE_NAME, metadata={"format": "pt"})
    save_file(stored, folder / SINGLE_NAME, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": MXFP4}
    (folder / "config.json").write_text(json.dumps(config))
    return Saved(folder, reference, meant)

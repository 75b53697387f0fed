"""Tiny random vision-language checkpoints, in the layouts in which they are published."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.model.checkpoints import save_byte_tokenizer

TEXT = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 320,
    "max_position_embeddings": 512, "initializer_range": 0.15, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 128,
}  # fmt: skip
MROPE = {"type": "mrope", "mrope_section": [4, 6, 6]}

# Name: the transformers config class, its settings, and what is changed in the files as saved.
LAYOUTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma3": (
        "Gemma3Config",
        {"text_config": TEXT | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24},
         "vision_config": TOWER, "mm_tokens_per_image": 4, "image_token_index": 300},
        "",
    ),
    "mistral3": (
        "Mistral3Config",
        {"text_config": TEXT | {"model_type": "mistral", "head_dim": 32},
         "vision_config": TOWER | {"model_type": "pixtral"}, "tie_word_embeddings": False},
        "",
    ),
    # As Mistral publishes it: nothing is said of the head, and the class would have it tied.
    "mistral3, untold": (
        "Mistral3Config",
        {"text_config": TEXT | {"model_type": "mistral", "head_dim": 32},
         "vision_config": TOWER | {"model_type": "pixtral"}, "tie_word_embeddings": False},
        "untold head",
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig",
        {"text_config": TEXT | {"rope_parameters": MROPE | {"rope_theta": 1e6}},
         "vision_config": QWEN_TOWER | {"fullatt_block_indexes": [0]}, "image_token_id": 300,
         "tie_word_embeddings": False},
        "",
    ),
    # As Qwen publishes it: the decoder's settings stand beside vision_config.
    "qwen2.5-vl, flat": (
        "Qwen2_5_VLConfig",
        {"text_config": TEXT | {"rope_parameters": MROPE | {"rope_theta": 1e6}},
         "vision_config": QWEN_TOWER | {"fullatt_block_indexes": [0]}, "image_token_id": 300,
         "tie_word_embeddings": True},
        "flat",
    ),
    "qwen2-vl": (
        "Qwen2VLConfig",
        {"text_config": TEXT | {"rope_parameters": MROPE | {"rope_theta": 1e6}},
         "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 128, "num_heads": 2},
         "image_token_id": 300, "tie_word_embeddings": False},
        "",
    ),
    "qwen3-vl": (
        "Qwen3VLConfig",
        {"text_config": TEXT | {
            "head_dim": 32, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6],
                "mrope_interleaved": True}},
         "vision_config": QWEN_TOWER | {"deepstack_visual_indexes": [0]}, "image_token_id": 300,
         "tie_word_embeddings": False},
        "",
    ),
    "llava": (
        "LlavaConfig",
        {"text_config": TEXT | {"model_type": "llama"},
         "vision_config": TOWER | {"model_type": "clip_vision_model"}, "image_token_index": 300,
         "tie_word_embeddings": False},
        "",
    ),
    # As transformers names the tensors in memory, and some tools save them.
    "mistral3, inner names": (
        "Mistral3Config",
        {"text_config": TEXT | {"model_type": "mistral", "head_dim": 32},
         "vision_config": TOWER | {"model_type": "pixtral"}, "tie_word_embeddings": False},
        "inner names",
    ),
}  # fmt: skip
if hasattr(transformers, "Kimi_K25Config"):  # a mixture with latent attention inside
    LATENT = {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
        "v_head_dim": 32, "head_dim": 16, "num_key_value_heads": 4,
    }  # fmt: skip
    MIXTURE = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 1, "moe_intermediate_size": 128, "first_k_dense_replace": 1,
    }  # fmt: skip
    LAYOUTS["kimi-k2.5"] = (
        "Kimi_K25Config",
        {"text_config": TEXT | LATENT | MIXTURE | {"model_type": "kimi_k2"},
         "vision_config": TOWER, "tie_word_embeddings": False},
        "layers",
    )  # fmt: skip


def save_vision_language(name: str, folder: Path) -> Path:
    """Save a random checkpoint of a layout, in float32."""
    config_class, settings, change = LAYOUTS[name]
    config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(sum(name.encode()))
    model = transformers.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_bias = parameter_name.endswith("bias")
            if parameter.dim() == 1:
                parameter.normal_(std=0.3).add_(0.0 if is_bias else 1.0)
            else:
                parameter.normal_(std=0.15)
        if config.tie_word_embeddings:  # or each token's best successor is itself
            model.get_input_embeddings().weight.mul_(0.2)
        for parameter in model.parameters():  # --save-low-bit converts what bfloat16 makes of it
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    if change == "flat":
        text = written.pop("text_config")
        scaling = {"mrope_section": [4, 6, 6], "type": "mrope"}
        text |= {"rope_theta": text.pop("rope_parameters")["rope_theta"], "rope_scaling": scaling}
        path.write_text(json.dumps(text | written))
    if change == "untold head":
        del written["tie_word_embeddings"]
        written["text_config"].pop("tie_word_embeddings", None)
        path.write_text(json.dumps(written))
    if change == "layers":  # which transformers writes by the name of those of the tower
        tensors = load_file(folder / "model.safetensors")
        renamed = {key.replace("model.blocks", "model.layers"): one for key, one in tensors.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    if change == "inner names":
        tensors = load_file(folder / "model.safetensors")
        renamed = {
            re.sub(r"^(vision_tower|multi_modal_projector)", r"model.\1",
                   key.replace("language_model.lm_head", "lm_head")
                   .replace("language_model.model", "model.language_model")): value
            for key, value in tensors.items()
        }  # fmt: skip
        assert "model.language_model.embed_tokens.weight" in renamed
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def generate_with_transformers(
    folder: Path, prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    """Greedy tokens of transformers' own model of text and images, given text alone."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager"
    ).float()
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers

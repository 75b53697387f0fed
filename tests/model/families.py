"""One tiny random checkpoint for each model family that the server claims, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.model.checkpoints import save_byte_tokenizer

COMMON = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

WINDOW = 24

# Family: name of the transformers config class, and what makes the family itself.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-bias": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-rope-llama3": (
        "LlamaConfig",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-rope-linear": (
        "LlamaConfig",
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "llama-rope-dynamic": (
        "LlamaConfig",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 64}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 48,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW, "resid_pdrop": 0.0}),
    "gpt-neox": ("GPTNeoXConfig", {"num_key_value_heads": None, "rotary_pct": 0.25}),
    "gpt-neox-serial": ("GPTNeoXConfig", {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    ),
}


DELTA_NET = {
    "num_hidden_layers": 4,  # the last attends
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_expand": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Those whose layers keep states, as transformers 5 has them.
STATE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-next": (
        "Qwen3NextConfig",
        DELTA_NET
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
        | {"shared_expert_intermediate_size": 128},
    ),
    "qwen3-5": ("Qwen3_5TextConfig", DELTA_NET),
    "olmo-hybrid": (  # transformers writes its convolutions in three parts of one size
        "OlmoHybridConfig",
        DELTA_NET | {"linear_num_key_heads": 4, "linear_key_head_dim": 32},
    ),
    "kimi-linear": (
        "KimiLinearConfig",
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        | {"linear_num_heads": 4, "linear_head_dim": 32, "num_key_value_heads": 4}
        | {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32, "kv_lora_rank": 32}
        | {"num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1}
        | {"moe_intermediate_size": 128, "num_expert_group": 1, "topk_group": 1},
    ),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}),
    "granite-hybrid": (  # one group of heads, which the ranks share
        "GraniteMoeHybridConfig",
        MAMBA
        | EXPERTS
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        | {"shared_intermediate_size": 128, "mamba_n_groups": 1},
    ),
    "falcon-h1": ("FalconH1Config", MAMBA | {"mamba_d_ssm": 256, "mamba_n_groups": 2}),
    "falcon-h1-norm": (
        "FalconH1Config",
        MAMBA
        | {"mamba_d_ssm": 256, "mamba_n_groups": 1, "mamba_rms_norm": True}
        | {"mamba_norm_before_gate": True, "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7]}
        | {"ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.5},
    ),
    "jamba": (
        "JambaConfig",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16, "num_experts": 4}
        | {"mamba_dt_rank": 8},
    ),
    "minimax": (
        "MiniMaxConfig",
        EXPERTS | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "nemotron-h": (
        "NemotronHConfig",
        {"layer_types": ["linear_attention", "moe", "full_attention", "mlp"]}
        | {"num_hidden_layers": 4, "mamba_num_heads": 8, "mamba_head_dim": 32}
        | {"ssm_state_size": 16, "n_groups": 2, "expand": 2, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
        | {"moe_shared_expert_intermediate_size": 128},
    ),
}


def save_family(name: str, folder: Path, **changes: Any) -> Path:
    """Save a random checkpoint of a family, in float32, as transformers itself writes it."""
    config_class, settings = (FAMILIES | STATE_FAMILIES)[name]
    config = getattr(transformers, config_class)(**(COMMON | settings | changes))
    torch.manual_seed(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Biases and norms are born as zeros and ones, which hide what handles them wrongly.
            if parameter.dim() == 1:
                is_bias = parameter_name.endswith("bias")
                parameter.normal_(std=0.3).add_(0.0 if is_bias else 1.0)
    if config.tie_word_embeddings:  # or each token's best successor is itself
        model.get_input_embeddings().weight.data.mul_(0.2)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def generate_with_transformers(
    folder: Path, prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    """Greedy tokens of transformers' own generate, in float32, one prompt at a time."""
    # Eager, because sdpa in older versions leaves Gemma's softcap out.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model = model.float()
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers

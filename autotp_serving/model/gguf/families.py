"""What GGUF calls the tensors and settings of each family, and what transformers calls them.

Every rank, without torch. llama.cpp's converter also changes some values on the way: it reorders
the rows of Llama's queries and keys, and adds one to Gemma's norms. Both are undone at reading.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PHI3_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Factors of rotary frequencies: settings rather than weights, see `config`."""


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: of transformers.
        class_name: of its model in transformers.
        layer_names: of the tensors in a layer, theirs to transformers'; `{}` stands for an expert.
        permutes: the rows of queries and keys are in another order.
        norm_offset: what was added to the norms.
        settings: further keys of this family, and what config.json calls them.
    """

    model_type: str
    class_name: str
    layer_names: dict[str, str]
    permutes: bool = False
    norm_offset: float = 0.0
    settings: dict[str, str] = field(default_factory=dict)


WINDOW = {"attention.sliding_window": "sliding_window"}
SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}

FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", LAYER_NAMES, permutes=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", LAYER_NAMES),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", LAYER_NAMES | HEAD_NORMS),
    "qwen3moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        LAYER_NAMES | HEAD_NORMS | EXPERTS,
        settings={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
    ),
    "phi3": Family("phi3", "Phi3ForCausalLM", LAYER_NAMES | PHI3_FUSED, settings=WINDOW),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        LAYER_NAMES | GEMMA_NORMS,
        norm_offset=1.0,
        settings=WINDOW | SOFTCAPS,
    ),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        LAYER_NAMES | GEMMA_NORMS | HEAD_NORMS,
        norm_offset=1.0,
        settings=WINDOW | SOFTCAPS,
    ),
}
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    LAYER_NAMES | EXPERTS,
    permutes=True,
    settings={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
)
"""Goes by the name llama, and has experts."""


def find_family(metadata: dict[str, object]) -> Family | None:
    """The family of a file, or None."""
    architecture = metadata.get("general.architecture")
    if architecture == "llama" and metadata.get("llama.expert_count"):
        return MIXTRAL
    return FAMILIES.get(architecture) if isinstance(architecture, str) else None


def translate_name(family: Family, name: str) -> str | None:
    """The name that transformers has for a tensor, with `{}` for the number of an expert.

    Returns:
        None for a tensor that this family does not have.
    """
    stem, _, attribute = name.rpartition(".")
    if attribute not in ("weight", "bias"):
        return None
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.{attribute}"
    match = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", stem)
    inner = family.layer_names.get(match[2]) if match else None
    if match is None or inner is None:
        return None
    return f"model.layers.{int(match[1])}.{inner}.{attribute}"

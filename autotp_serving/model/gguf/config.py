"""A GGUF file's settings as a config.json, and its defaults as a generation_config.json. Any rank.

What is known is translated, what changes nothing is passed over, and anything else is refused by
name: a setting that is left out would change the answers without a word.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from autotp_serving.config import ConfigError
from autotp_serving.model.gguf.families import FAMILIES, Family, find_family
from autotp_serving.model.gguf.header import GgufError, GgufHeader, StoredTensor
from autotp_serving.model.sizes import check_sizes

SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
REQUIRED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
# Read below, together with others.
COMBINED = {
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.freq_base_swa",
    "attention.sliding_window_pattern",
    "expert_count",
    "expert_used_count",
}
# Say how the file came about, or what the family does anyway.
SILENT = {"rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "pooling_type": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_shared_count": (0,),
    "logit_scale": (0.0, 1.0),
    "leading_dense_block_count": (0,),
}
SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
# End tokens that llama.cpp knows by their names, where a file's chat template writes them.
END_NAMES = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

LLAMA3_KNOWN = [(1.0, 4.0, 8192)]
"""low_freq_factor, high_freq_factor and the length of the first training, of all Llama 3 models."""
MAX_ROPE_FACTORS = 4096


def make_config(header: GgufHeader, path: Path) -> dict[str, Any]:
    """The config.json that transformers would have written.

    Args:
        header: of the file, or of all its parts.

    Raises:
        GgufError: a family that is not known, or a setting that is not understood.
    """
    try:
        return _translate(header, path)
    except ConfigError:  # a ValueError too
        raise
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise GgufError(
            f"{path} holds settings of the wrong kind ({type(error).__name__}: {error!s:.80}): "
            "download it again"
        ) from error


def _translate(header: GgufHeader, path: Path) -> dict[str, Any]:
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    family = find_family(metadata)
    if family is None:
        raise GgufError(
            f"{path} holds the architecture {architecture!r:.60}, and GGUF files are read of "
            f"{', '.join(FAMILIES)}: use the model's safetensors"
        )
    if metadata.get("general.type", "model") != "model":
        raise GgufError(f"{path} holds no model but {metadata['general.type']!r:.40}: leave it out")
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    _check_settings(own, family, path)
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.class_name],
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    config |= {name: own[key] for key, name in (SETTINGS | family.settings).items() if key in own}
    tokens = metadata.get("tokenizer.ggml.tokens")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None:  # a vocabulary may be longer or shorter than what the model has
        config["vocab_size"] = embedding.shape[0]
    elif "vocab_size" not in config and isinstance(tokens, list):
        config["vocab_size"] = len(tokens)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    check_sizes(config)
    if own.get("attention.value_length", config["head_dim"]) != config["head_dim"]:
        raise GgufError(
            f"{path}: keys and values of different lengths ({config['head_dim']} and "
            f"{own['attention.value_length']}) are not served"
        )
    _add_biases(config, family, header)
    _add_rope(config, own, header, path)
    if family.model_type.startswith("gemma"):
        _add_gemma(config, own, path)
    if family.model_type == "qwen3_moe":
        config |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if family.model_type == "mixtral" and config.get("sliding_window") is None:
        config["sliding_window"] = None
    ends = find_end_tokens(metadata)
    config["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    config["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    config["pad_token_id"] = metadata.get("tokenizer.ggml.padding_token_id")
    if family.model_type == "phi3" and config["pad_token_id"] is None:
        config["pad_token_id"] = ends[0] if ends else None
    return config


def make_generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """End tokens, and the sampling that a file recommends."""
    found: dict[str, Any] = {
        name: metadata[key]
        for key, name in SAMPLING.items()
        if type(metadata.get(key)) in (int, float)
    }
    if found:
        found["do_sample"] = found.get("temperature", 1.0) > 0.0
    return found | {"eos_token_id": find_end_tokens(metadata)}


def find_end_tokens(metadata: dict[str, Any]) -> list[int]:
    """Tokens that end a completion, the one that the file calls so first."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    found = [metadata.get(f"tokenizer.ggml.{key}") for key in END_KEYS]
    template = metadata.get("tokenizer.chat_template")
    for name in END_NAMES if isinstance(template, str) else ():
        if name in template and name in tokens:
            found.append(tokens.index(name))
    return [*dict.fromkeys(one for one in found if type(one) is int and 0 <= one < len(tokens))]


def _check_settings(own: dict[str, Any], family: Family, path: Path) -> None:
    for key, value in own.items():
        if key in NEUTRAL and value in NEUTRAL[key]:
            continue
        if key not in {*SETTINGS, *family.settings, *COMBINED, *SILENT}:
            raise GgufError(
                f"{path}: the setting {key} = {value!r:.40} is not known for the family "
                f"'{family.model_type}': use the model's safetensors"
            )
        if key in (*SETTINGS, *family.settings) and type(value) not in (int, float):
            raise GgufError(
                f"{path}: {key} is {value!r:.40}, and layers that differ from each other are not "
                "served: use the model's safetensors"
            )
    if missing := [key for key in REQUIRED if key not in own]:
        raise GgufError(f"{path} does not say {missing[0]}: download it again")
    if any(own[key] <= 0 for key in REQUIRED):
        raise GgufError(f"{path} gives a size of zero or less: download it again")


def _add_biases(config: dict[str, Any], family: Family, header: GgufHeader) -> None:
    """Llama and Qwen 3 say by their tensors alone whether they have biases."""
    if family.model_type in ("llama", "qwen3", "qwen3_moe"):
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if family.model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors


def _add_rope(config: dict[str, Any], own: dict[str, Any], header: GgufHeader, path: Path) -> None:
    """Rotary embeddings that are stretched, by a setting or by factors among the tensors."""
    head_dim = config["head_dim"]
    rotary_dim = own.get("rope.dimension_count", head_dim)
    if rotary_dim != head_dim:
        if config["model_type"] != "phi3" or not 0 < rotary_dim < head_dim:
            raise GgufError(
                f"{path} rotates {rotary_dim} of {head_dim} numbers of a head, which the family "
                f"'{config['model_type']}' does not: use the model's safetensors"
            )
        config["partial_rotary_factor"] = rotary_dim / head_dim
    kind = own.get("rope.scaling.type", "none")
    factor = own.get("rope.scaling.factor", 1.0)
    trained = own.get("rope.scaling.original_context_length")
    if config["model_type"] == "phi3":
        long, short = (
            _read_factors(header.tensors.get(f"rope_factors_{one}.weight"), path)
            for one in ("long", "short")
        )
        if (long is None) != (short is None):
            raise GgufError(f"{path} lacks one of its lists of rotary factors: download it again")
        config["original_max_position_embeddings"] = trained or config["max_position_embeddings"]
        if long is not None:
            config["rope_scaling"] = {
                "type": "longrope",
                "long_factor": long,
                "short_factor": short,
            }
        return
    stored = _read_factors(header.tensors.get("rope_freqs.weight"), path)
    if stored is not None:
        config["rope_scaling"] = _find_llama3(stored, config, path)
    elif kind == "linear" and factor != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and factor != 1.0:
        config["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": trained or config["max_position_embeddings"],
        }
        names = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        for key, name in names.items():
            if f"rope.scaling.{key}" in own:
                config["rope_scaling"][name] = own[f"rope.scaling.{key}"]
    elif kind not in ("none", "linear", "yarn"):
        raise GgufError(
            f"{path} scales its rotary embeddings by {kind!r:.40}, which is not known: use the "
            "model's safetensors"
        )


def _read_factors(tensor: StoredTensor | None, path: Path) -> list[float] | None:
    """A short list of float32 among the tensors."""
    if tensor is None:
        return None
    if tensor.type.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > MAX_ROPE_FACTORS:
        raise GgufError(f"{path}: its rotary factors are no list of float32: download it again")
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.num_bytes)
    if len(data) < tensor.num_bytes:
        raise GgufError(f"{tensor.path} is cut short: download it again")
    return list(struct.unpack(f"<{tensor.shape[0]}f", data))


def _find_llama3(stored: list[float], config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings from which Llama 3's converter computed these factors, checked against them."""
    if 2 * len(stored) != config["head_dim"]:
        raise GgufError(f"{path} holds {len(stored)} rotary factors for heads of another size")
    factor = round(max(stored), 3)
    for low, high, trained in LLAMA3_KNOWN:
        expected = compute_llama3_factors(config, factor, low, high, trained)
        if all(math.isclose(*pair, rel_tol=1e-4) for pair in zip(expected, stored, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": trained,
            }
    raise GgufError(
        f"{path} holds rotary factors that are not those of Llama 3 (up to {factor}): use the "
        "model's safetensors"
    )


def compute_llama3_factors(
    config: dict[str, Any], factor: float, low: float, high: float, trained: int
) -> list[float]:
    """What each rotary frequency is divided by: 1 for the fast ones, `factor` for the slow ones."""
    head_dim = config["head_dim"]
    factors = []
    for index in range(0, head_dim, 2):
        wavelen = 2 * math.pi * config.get("rope_theta", 10000.0) ** (index / head_dim)
        if wavelen < trained / high:
            factors.append(1.0)
        elif wavelen > trained / low:
            factors.append(factor)
        else:
            smooth = (trained / wavelen - low) / (high - low)
            factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return factors


def _add_gemma(config: dict[str, Any], own: dict[str, Any], path: Path) -> None:
    """How Gemma scales its scores, which is told by its size alone; Gemma 3's two rotary bases."""
    largest = 46 if config["model_type"] == "gemma2" else 62  # layers of the 27 B models
    by_width = config["num_hidden_layers"] == largest
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if by_width else config["head_dim"]
    )
    config["hidden_activation"] = "gelu_pytorch_tanh"
    if config["model_type"] == "gemma2":
        config.setdefault("attn_logit_softcapping", 50.0)
        config.setdefault("final_logit_softcapping", 30.0)
        return
    local = {"rope_type": "default", "rope_theta": own.get("rope.freq_base_swa", 10000.0)}
    distant = {"rope_type": "default", "rope_theta": config.pop("rope_theta", 1e6)}
    distant |= config.pop("rope_scaling", {})
    config["rope_parameters"] = {"full_attention": distant, "sliding_attention": local}
    every = own.get("attention.sliding_window_pattern", 6)
    if type(every) is int and every > 0:
        every = [(layer + 1) % every != 0 for layer in range(config["num_hidden_layers"])]
    if not isinstance(every, list) or len(every) != config["num_hidden_layers"]:
        raise GgufError(f"{path} does not say which layers see a window only: download it again")
    config["layer_types"] = ["sliding_attention" if one else "full_attention" for one in every]

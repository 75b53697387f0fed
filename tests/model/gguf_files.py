"""Checkpoints written as GGUF files by the gguf package, as llama.cpp's converter would.

Names come from the package's own table, the reordering of Llama's heads and the offset of Gemma's
norms are done here anew, so that what reads them is held against another's work.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

Type = gguf.GGMLQuantizationType
ARCHITECTURES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "mixtral": "llama"}

# Where the float16 factors of a K-quant block are: of the scales, and of the minimums with how
# much larger they are, so that numbers come out around zero.
K_FACTORS = {
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0.0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0.0),
}


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in float32."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {name: tensor.float() for name, tensor in tensors.items()}


def write_gguf(
    folder: Path,
    path: Path,
    type_name: str,
    *,
    change: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    tokens: bool = True,
    split_max_tensors: int = 0,
) -> Path:
    """Write a checkpoint as a GGUF file.

    Args:
        type_name: of the matrices; norms and biases are F32.

    Returns:
        Folder of the same checkpoint with the numbers that the file holds, for transformers.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    add_settings(writer, config, architecture)
    if tokens:
        add_byte_level_tokens(writer, folder, config.vocab_size)
    change(writer)
    number = gguf.MODEL_ARCH_NAMES
    names = gguf.get_tensor_name_map(
        next(key for key, value in number.items() if value == architecture),
        config.num_hidden_layers,
    )
    rng = np.random.default_rng(5)
    kept: dict[str, torch.Tensor] = {}
    state = _stack_experts(read_state(folder))
    for name, tensor in state.items():
        stem, attribute = name.rsplit(".", 1)
        if config.tie_word_embeddings and stem == "lm_head":
            continue
        gguf_name = names.get_name(stem)
        assert gguf_name is not None, name
        array = tensor.numpy()
        heads = _count_heads(stem, config) if architecture == "llama" else None
        if heads:
            array = interleave(array, heads)
        if architecture.startswith("gemma") and stem.endswith("norm"):
            array = array + 1
        kind = Type[type_name] if array.ndim > 1 and "gate_inp" not in gguf_name else Type.F32
        data, back = encode(array, kind, rng)
        writer.add_tensor(f"{gguf_name}.{attribute}", data, raw_dtype=kind)
        if architecture.startswith("gemma") and stem.endswith("norm"):
            back = back - 1
        if heads:
            back = deinterleave(back, heads)
        kept |= _unstack(name, torch.from_numpy(np.ascontiguousarray(back)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    decoded = path.with_suffix(".decoded")
    model.save_pretrained(decoded)  # its own names for stacked experts
    _replace(decoded, kept)
    return decoded


def _replace(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    (path,) = folder.glob("*.safetensors")
    stored = load_file(path)
    assert set(stored) <= set(tensors), set(stored) ^ set(tensors)
    save_file({name: tensors[name] for name in stored}, path, metadata={"format": "pt"})


def _count_heads(stem: str, config: Any) -> int | None:
    if stem.endswith("q_proj"):
        return config.num_attention_heads
    return config.num_key_value_heads if stem.endswith("k_proj") else None


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter does it: the halves of each head in turns."""
    rows = array.shape[0]
    order = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
    return array[order]


def deinterleave(array: np.ndarray, heads: int) -> np.ndarray:
    """The other way round."""
    rows = array.shape[0]
    order = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
    back = np.empty_like(array)
    back[order] = array
    return back


def encode(
    array: np.ndarray, kind: Type, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """What is stored, and the numbers that it means.

    The package cannot quantize to K-quants: blocks of random numbers of the same size stand in.
    """
    array = np.ascontiguousarray(array, dtype=np.float32)
    if kind.name in K_FACTORS:
        data = make_k_blocks(array.shape, kind, float(array.std()), rng)
    else:
        data = gguf.quants.quantize(array, kind)
    back = gguf.quants.dequantize(data, kind) if kind != Type.F32 else array
    return data, back.reshape(array.shape)


def make_k_blocks(
    shape: tuple[int, ...], kind: Type, std: float, rng: np.random.Generator
) -> np.ndarray:
    """Random K-quant blocks whose numbers have this standard deviation."""
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    at, minimum_at, ratio = K_FACTORS[kind.name]
    rows = int(np.prod(shape[:-1]))
    data = rng.integers(0, 256, (rows, shape[-1] // block, num_bytes), dtype=np.uint8)

    def set_factor(factor: float) -> np.ndarray:
        data[..., at : at + 2] = np.frombuffer(np.float16(factor).tobytes(), np.uint8)
        if minimum_at is not None:
            smallest = np.float16(factor * ratio).tobytes()
            data[..., minimum_at : minimum_at + 2] = np.frombuffer(smallest, np.uint8)
        return data.reshape(*shape[:-1], -1)

    found = gguf.quants.dequantize(set_factor(0.01), kind).std()
    return set_factor(0.01 * std / found)


def _stack_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of a layer in one tensor, as GGUF has them."""
    stacked: dict[str, Any] = {}
    for name, tensor in state.items():
        if ".experts." not in name:
            stacked[name] = tensor
            continue
        before, after = name.split(".experts.")
        number, part = after.split(".", 1)
        stacked.setdefault(f"{before}.experts.{part}", {})[int(number)] = tensor
    return {
        name: torch.stack([value[one] for one in sorted(value)]) if type(value) is dict else value
        for name, value in stacked.items()
    }


def _unstack(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if ".experts." not in name:
        return {name: tensor.clone()}
    before, part = name.split(".experts.")
    return {f"{before}.experts.{i}.{part}": one.clone() for i, one in enumerate(tensor)}


def add_settings(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    """The settings that llama.cpp's converter writes for these families."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.rope_parameters
    if architecture == "gemma3":
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", make_llama3_factors(rope, head_dim))


def make_llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """From transformers' own frequencies, with and without the stretching."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=dict(rope))
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / stretched).numpy().astype(np.float32)


def add_byte_level_tokens(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """The vocabulary of a byte-level tokenizer.json; ids without a token are filled up."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = {number: token for token, number in content["model"]["vocab"].items()}
    types = dict.fromkeys(vocab, gguf.TokenType.NORMAL)
    for one in content["added_tokens"]:
        vocab[one["id"]] = one["content"]
        types[one["id"]] = gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED
    size = max(vocab_size, len(vocab))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([vocab.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([types.get(number, gguf.TokenType.UNUSED) for number in range(size)])
    merges = [one if isinstance(one, str) else " ".join(one) for one in content["model"]["merges"]]
    if merges:
        writer.add_token_merges(merges)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ids = {token: number for number, token in vocab.items()}
    for name, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        token = settings.get(name)
        token = token["content"] if isinstance(token, dict) else token
        if token in ids:
            add(ids[token])
    processor = json.dumps(content["post_processor"])
    writer.add_add_bos_token(
        "bos_token" in settings and json.dumps(settings["bos_token"]) in processor
    )
    if isinstance(settings.get("chat_template"), str):
        writer.add_chat_template(settings["chat_template"])

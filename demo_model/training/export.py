"""Writes the trained weights as a Hugging Face folder: small shards, an index, the configs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model import Llama
from safetensors.torch import load_file, save_file
from texts import BOS, END, EOS, PAD
from tokenizers import Tokenizer

MAX_SHARD_BYTES = 15_000_000


def named_views(model: Llama) -> dict[str, torch.Tensor]:
    """Views of the stacked weights under the names of LlamaForCausalLM."""
    shape = model.shape
    tensors = {"model.embed_tokens.weight": model.embed}
    for i in range(shape.num_hidden_layers):
        at = f"model.layers.{i}"
        q, k, v = model.qkv[i].split([shape.q_size, shape.kv_size, shape.kv_size])
        gate, up = model.gate_up[i].chunk(2)
        tensors |= {
            f"{at}.input_layernorm.weight": model.norms[2 * i],
            f"{at}.self_attn.q_proj.weight": q,
            f"{at}.self_attn.k_proj.weight": k,
            f"{at}.self_attn.v_proj.weight": v,
            f"{at}.self_attn.o_proj.weight": model.o[i],
            f"{at}.post_attention_layernorm.weight": model.norms[2 * i + 1],
            f"{at}.mlp.gate_proj.weight": gate,
            f"{at}.mlp.up_proj.weight": up,
            f"{at}.mlp.down_proj.weight": model.down[i],
        }
    tensors["model.norm.weight"] = model.norms[-1]
    return tensors


def load_exported(model: Llama, folder: Path) -> None:
    """Takes over the weights of an exported folder."""
    exported: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        exported |= load_file(path)
    with torch.no_grad():
        for name, target in named_views(model).items():
            target.copy_(exported[name])


def shards_of(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Fills shards in order, none over the limit."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = MAX_SHARD_BYTES - 100_000  # for the header
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = MAX_SHARD_BYTES - 100_000
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def export(model: Llama, folder: Path) -> None:
    """Writes weights, index, config.json and generation_config.json beside the tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, pad = tokenizer.token_to_id(BOS), tokenizer.token_to_id(PAD)
    ends = [tokenizer.token_to_id(EOS), tokenizer.token_to_id(END)]
    shape = model.shape
    for old in folder.glob("model*.safetensors"):
        old.unlink()
    tensors = {
        name: view.detach().to("cpu", torch.bfloat16).contiguous()
        for name, view in named_views(model).items()
    }
    shards = shards_of(tensors)
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
    size = sum(t.nbytes for t in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": places},
    )
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_hidden_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_key_value_heads,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": shape.max_position_embeddings,
            "rms_norm_eps": shape.rms_norm_eps,
            "rope_theta": shape.rope_theta,  # transformers 4 reads this, 5 the next line
            "rope_parameters": rope,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": bos,
            "eos_token_id": ends,
            "pad_token_id": pad,
            "torch_dtype": "bfloat16",
        },
    )
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": pad, "do_sample": False},
    )

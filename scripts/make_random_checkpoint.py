"""Write a random checkpoint in a known shape, for measuring without downloading.

    python scripts/make_random_checkpoint.py tinyllama-1.1b /tmp/tinyllama

Streams tensor after tensor to disk: memory stays near one tensor, whatever the model's size. The
weights are small normal numbers, so that activations stay finite; the text is nonsense. The
tokenizer is copied from the demo model, whose tokens are a part of every shape's vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632,
        "vocab_size": 32000, "max_position_embeddings": 2048},
    "llama2-7b": {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008,
        "vocab_size": 32000, "max_position_embeddings": 4096},
    "llama3-8b": {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0},
    "qwen2.5-0.5b": {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864,
        "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "tie_word_embeddings": True},
    "qwen2.5-7b": {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
        "vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1000000.0},
    "mistral-7b": {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3.5-0.8b": {"model_type": "qwen3_5_text", "hidden_size": 1024, "num_hidden_layers": 24,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
        "intermediate_size": 3584, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
        "vocab_size": 248320, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    "gpt-oss-1b": {"model_type": "gpt_oss", "hidden_size": 1024, "num_hidden_layers": 12,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 1024,
        "num_local_experts": 16, "num_experts_per_tok": 4, "vocab_size": 201088,
        "max_position_embeddings": 32768},
}  # fmt: skip

BLOCK_ELEMENTS = 2**24
WEIGHT_STD = 0.02


def main(argv: list[str] | None = None) -> int:
    """Write config, weights in shards, index and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shard-gib", type=float, default=2.0, help="size of one file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    shapes = list_tensor_shapes(options.shape, options.folder)
    needed = sum(2 * math.prod(shape) for shape in shapes.values())
    free = shutil.disk_usage(options.folder).free
    if needed > free:
        print(
            f"error: {needed >> 20} MiB are needed in {options.folder}, {free >> 20} MiB are free",
            file=sys.stderr,
        )
        return 2
    write_shards(shapes, options.folder, int(options.shard_gib * 2**30), options.seed)
    demo = Path(__file__).resolve().parents[1] / "demo_model"
    for path in demo.glob("tokenizer*.json"):
        shutil.copy(path, options.folder)
    print(f"{options.folder}: {needed >> 20} MiB in {len(shapes)} tensors")
    return 0


def list_tensor_shapes(name: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Write config.json and return the shape of every tensor of the checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2} | SHAPES[name]
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def write_shards(
    shapes: dict[str, tuple[int, ...]], folder: Path, shard_bytes: int, seed: int
) -> None:
    """Write bfloat16 safetensors files of at most `shard_bytes`, and their index."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = shape
        room -= size
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Writing weights") as bar:
        for number, shard in enumerate(shards, 1):
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with (folder / file_name).open("wb") as file:
                file.write(make_header(shard))
                for name, shape in shard.items():
                    weight_map[name] = file_name
                    for block in make_blocks(name, math.prod(shape), generator):
                        file.write(block.view(torch.uint8).numpy().data)
                        bar.update(block.nbytes)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def make_header(shard: dict[str, tuple[int, ...]]) -> bytes:
    """Header of a safetensors file: its length in 8 bytes, then JSON, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.items():
        size = 2 * math.prod(shape)
        entries[name] = {
            "dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size],
        }  # fmt: skip
        offset += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def make_blocks(name: str, count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Make a tensor's numbers a block at a time: ones for norms, zeros for biases."""
    for start in range(0, count, BLOCK_ELEMENTS):
        size = min(BLOCK_ELEMENTS, count - start)
        if name.endswith("norm.weight"):
            yield torch.ones(size, dtype=torch.bfloat16)
        elif name.endswith("bias"):
            yield torch.zeros(size, dtype=torch.bfloat16)
        else:
            yield (torch.randn(size, generator=generator) * WEIGHT_STD).to(torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())

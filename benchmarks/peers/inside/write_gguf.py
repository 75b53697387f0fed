"""Write a Llama checkpoint as GGUF: `write_gguf.py CHECKPOINT FORMAT FILE`. Needs gguf, torch-free.

Every matrix, embedding and head included, gets the format; norms stay F32.
"""

import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize


def main() -> None:
    folder, name, target = Path(sys.argv[1]), sys.argv[2].upper(), Path(sys.argv[3])
    kind = gguf.GGMLQuantizationType[name]
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    add_settings(writer, config)
    writer.add_file_type(gguf.LlamaFileType["MOSTLY_" + name])
    add_tokenizer(writer, folder, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for tensor, file in index.items():
        values = read_bf16(folder / file, tensor)
        if tensor.endswith("q_proj.weight"):
            values = interleave_halves(values, config["num_attention_heads"])
        elif tensor.endswith("k_proj.weight"):
            values = interleave_halves(values, config["num_key_value_heads"])
        target_name = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if values.ndim == 1:
            writer.add_tensor(target_name, values)
        else:
            writer.add_tensor(target_name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_settings(writer: gguf.GGUFWriter, config: dict) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    parameters = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(config.get("rope_theta") or parameters.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    added = {item["id"]: item["content"] for item in tokenizer["added_tokens"]}
    words = {number: word for word, number in vocabulary.items()} | added
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words[number] for number in range(config["vocab_size"])])
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types(
        [control if number in added else normal for number in range(config["vocab_size"])]
    )
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    )
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def read_bf16(path: Path, name: str) -> np.ndarray:
    """One BF16 tensor of a safetensors file as float32."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length))[name]
        start, stop = entry["data_offsets"]
        file.seek(8 + length + start)
        data = np.frombuffer(file.read(stop - start), dtype=np.uint16)
    return (data.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


def interleave_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp's rotary embedding: pairs side by side, not half by half."""
    rows, cols = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, cols)
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows, cols))


if __name__ == "__main__":
    main()

"""Write a checkpoint as compressed-tensors: `write_compressed_tensors.py CHECKPOINT w8a8 FOLDER`.

w8a8: int8 with a scale per row, activations per token; w4a16: int4 in groups of 128. Linears of the
layers only, as vLLM's own recipes have it; embedding and head stay BF16. Runs where vLLM is.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors import safe_open
from safetensors.torch import save_file

GROUP = 128
DYNAMIC_TOKENS = {
    "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
}  # fmt: skip
SCHEMES = {
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, DYNAMIC_TOKENS),
    "w4a16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}, None),
}


def main() -> None:
    source, name, target = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    kind, weights, activations = SCHEMES[name]
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob("tokenizer*.json"):
        shutil.copy(path, target)
    index = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors = {}
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                value = file.get_tensor(key)
                if key.endswith("_proj.weight"):
                    tensors |= convert(key, value.float(), name)
                else:
                    tensors[key] = value
        save_file(tensors, target / path.name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, path.name)
    (target / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": kind,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"type": "int", "symmetric": True, "dynamic": False} | weights,
                "input_activations": activations,
                "output_activations": None,
            }
        },
    }
    (target / "config.json").write_text(json.dumps(config, indent=2))


def convert(key: str, weight: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """Round to the nearest step; the largest number of a row or group is the last step."""
    prefix = key.removesuffix("weight")
    rows, cols = weight.shape
    grouped = weight if name == "w8a8" else weight.view(rows, -1, GROUP)
    steps = 127 if name == "w8a8" else 7
    scale = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-8) / steps
    scale = scale.bfloat16()
    numbers = (grouped / scale.float()).round().clamp(-steps - 1, steps).to(torch.int8)
    numbers = numbers.view(rows, cols)
    if name == "w8a8":
        return {key: numbers, f"{prefix}weight_scale": scale}
    return {
        f"{prefix}weight_packed": pack_to_int32(numbers, 4),
        f"{prefix}weight_scale": scale.squeeze(-1),
        f"{prefix}weight_shape": torch.tensor([rows, cols]),
    }


if __name__ == "__main__":
    main()

"""What the compressed-tensors library itself writes, against what it reads back itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from autotp_serving.low_bit.tensor import dequantize
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.stored_tensors import SINGLE_NAME

compressors = pytest.importorskip(
    "compressed_tensors.compressors.base", reason="pip install compressed-tensors"
)

ROWS, COLS = 96, 256

# Layout, what its weights become, the largest difference in units of a scale, and the scheme.
CASES: list[tuple[str, str, float, dict[str, Any]]] = [
    ("pack-quantized", "sym_int4", 0, {"num_bits": 4, "group_size": 64}),
    ("pack-quantized", "sym_int4", 0, {"num_bits": 4, "group_size": 128}),
    ("pack-quantized", "asym_int4", 0.01, {"num_bits": 4, "group_size": 64, "symmetric": False}),
    ("pack-quantized", "sym_int8", 0, {"num_bits": 8, "group_size": 128}),
    ("pack-quantized", "sym_int4", 0, {"num_bits": 4, "strategy": "channel"}),
    ("int-quantized", "sym_int8", 0, {"num_bits": 8, "strategy": "channel"}),
    ("int-quantized", "sym_int8", 0, {"num_bits": 8, "strategy": "tensor"}),
    ("float-quantized", "fp8_e4m3", 0, {"type": "float", "strategy": "channel"}),
    ("float-quantized", "fp8_e4m3", 0, {"type": "float", "strategy": "tensor"}),
    (
        "float-quantized",
        "fp8_e4m3",
        0,
        {"type": "float", "strategy": "block", "block_structure": [32, 128]},
    ),
]


@pytest.mark.parametrize(("layout", "becomes", "tolerance", "scheme"), CASES)
def test_weights_are_what_the_library_reads_back(
    layout: str, becomes: str, tolerance: float, scheme: dict[str, Any], tmp_path: Path
) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = {"num_bits": 8, "type": "int", "symmetric": True} | scheme
    args = QuantizationArgs(**scheme)
    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))
    top = 448 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
    if args.block_structure:
        rows, cols = args.block_structure
        peaks = weight.view(ROWS // rows, rows, COLS // cols, cols).abs().amax((1, 3))
    elif args.group_size and args.group_size > 0:
        peaks = weight.view(ROWS, -1, args.group_size).abs().amax(2)
    else:
        peaks = weight.abs().amax(1, keepdim=True)
        if str(args.strategy) == "tensor" or scheme.get("strategy") == "tensor":
            peaks = peaks.max().view(1)
    state = {"weight": weight, "weight_scale": (peaks / top).half()}
    if not args.symmetric:
        state["weight_zero_point"] = torch.randint(-7, 8, peaks.shape, dtype=torch.int8)
    compressor = compressors.BaseCompressor.get_value_from_registry(layout)
    target = QuantizationScheme(targets=["Linear"], weights=args)
    written = compressor.compress(state, target)
    expected = compressor.decompress(written, target)["weight"]
    save_file(
        {f"layer.{name}": value.contiguous() for name, value in written.items()},
        tmp_path / SINGLE_NAME,
    )
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": json.loads(target.model_dump_json())},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.low_bit_format("layer.weight").name == becomes
    for rows, cols in (((0, ROWS), (0, COLS)), ((33, 70), (64, 192))):
        found = dequantize(checkpoint.read_low_bit("layer.weight", (rows, cols)))
        error = (found.half().float() - expected[slice(*rows), slice(*cols)].float()).abs().max()
        assert error <= tolerance * state["weight_scale"].float().max()

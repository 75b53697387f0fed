"""What the producers' own libraries write, where they are installed, against what they mean by it.

requirements/dev.txt has compressed-tensors. The others are large, and for who wants to know:
`pip install --no-deps bitsandbytes auto-round accelerate` and what they then miss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from autotp_serving.config import ServingConfig
from autotp_serving.low_bit.tensor import dequantize
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.stored_tensors import SINGLE_NAME
from tests.model.quantized import round_groups

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


def save_layer(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """A checkpoint of one layer."""
    save_file(
        {f"layer.{name}": value.contiguous() for name, value in tensors.items()},
        folder / SINGLE_NAME,
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))


@pytest.mark.parametrize(("layout", "becomes", "tolerance", "scheme"), CASES)
def test_weights_are_what_the_library_reads_back(
    layout: str, becomes: str, tolerance: float, scheme: dict[str, Any], tmp_path: Path
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors.base")
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
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": json.loads(target.model_dump_json())},
    }
    save_layer(tmp_path, written, config)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.low_bit_format("layer.weight").name == becomes
    for rows, cols in (((0, ROWS), (0, COLS)), ((33, 70), (64, 192))):
        found = dequantize(checkpoint.read_low_bit("layer.weight", (rows, cols)))
        error = (found.half().float() - expected[slice(*rows), slice(*cols)].float()).abs().max()
        assert error <= tolerance * state["weight_scale"].float().max()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("is_nested", [True, False])
def test_bitsandbytes(kind: str, is_nested: bool, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))
    codes, state = functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=is_nested, blocksize=64
    )
    parts = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    save_layer(tmp_path, {"weight": codes} | parts, settings)
    config = ServingConfig(model_path=str(tmp_path), low_bit="bf16", dtype="float32")
    found = Checkpoint(tmp_path, config).read("layer.weight", ((0, ROWS), (0, COLS)))
    assert torch.equal(found, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("group", [64, 128, -1])
@pytest.mark.parametrize(
    ("packing", "bits", "is_symmetric"),
    [
        (packing, *kind)
        for packing in ("auto_round:auto_gptq", "auto_round", "auto_round:auto_awq")
        for kind in ((4, True), (4, False), (8, True))
        if kind[0] == 4 or "awq" not in packing
    ],
)
def test_auto_round(
    packing: str, bits: int, is_symmetric: bool, group: int, tmp_path: Path
) -> None:
    pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp")
    from auto_round.export.export_to_awq.utils import WQLinear_GEMM
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))
    size = COLS if group == -1 else group
    _, scales, zeros, meant = round_groups(weight, size, bits, is_symmetric, torch.float16)
    linear = torch.nn.Linear(COLS, ROWS, bias=False)
    linear.weight.data = meant.clone()
    scales, zeros = scales.float(), zeros.float()
    if packing.endswith("awq"):
        packed = WQLinear_GEMM.from_linear(
            linear, bits, group, scales=scales.t(), zeros=zeros.t(), device="cpu"
        )
    else:
        module = qlinear_torch_zp if packing.endswith("auto_gptq") else qlinear_torch
        packed = module.QuantLinear(bits, group, COLS, ROWS, False)
        packed.device = torch.device("cpu")
        packed.pack(linear, scales, zeros, None, device="cpu")
    settings = {"quant_method": "auto-round", "packing_format": packing, "bits": bits}
    save_layer(tmp_path, packed.state_dict(), settings | {"group_size": group, "sym": is_symmetric})
    config = ServingConfig(model_path=str(tmp_path), low_bit="bf16", dtype="float32")
    found = Checkpoint(tmp_path, config).read("layer.weight", ((0, ROWS), (0, COLS)))
    assert torch.equal(found, meant)

"""Folders as ipex-llm's save_low_bit writes them: every byte of a weight is one of ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.low_bit.formats import FORMATS
from autotp_serving.low_bit.packing import unpack
from autotp_serving.low_bit.tensor import dequantize
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.stored_tensors import SINGLE_NAME
from tests.low_bit.native_layout import NATIVE_FORMATS, read_blocks

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 128, 4, 2, 32, 192
ATTENTION, LAYER_MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": 96,
}
SHAPES = {
    f"{ATTENTION}.qkv_proj": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    f"{ATTENTION}.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    f"{LAYER_MLP}.up_proj": (MLP, HIDDEN),
    f"{LAYER_MLP}.down_proj": (HIDDEN, MLP),
}


def make_bytes(name: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Random blocks of a native format with scales that are numbers."""
    rng = np.random.default_rng(seed)
    blocks = shape[0] * shape[1] // 64
    data = rng.integers(0, 256, (blocks, NATIVE_FORMATS[name][1]), dtype=np.uint8)
    half = rng.uniform(0.01, 0.1, (blocks, 2)).astype(np.float16).view(np.uint8)
    if name == "fp6":
        data[:, 48:] = half[:, :2]
    elif name == "fp8_e5m2":
        data[:, :4] = np.ones((blocks, 1), np.float32).view(np.uint8)
        data[:, 4:] &= 0xBB  # no exponent of all ones: infinity or NaN
    elif name in ("sym_int8", "fp8_e4m3"):
        data[:, :4] = rng.uniform(0.01, 0.1, (blocks, 1)).astype(np.float32).view(np.uint8)
    else:
        data[:, : 4 if name.startswith("asym") else 2] = half[:, : 4 if "asym" in name else 2]
    return data


@pytest.fixture(params=NATIVE_FORMATS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, np.ndarray], Path]:
    name = request.param
    blocks = {
        layer: make_bytes(name, shape, seed) for seed, (layer, shape) in enumerate(SHAPES.items())
    }
    tensors = {f"{layer}.weight": torch.from_numpy(data.ravel()) for layer, data in blocks.items()}
    tensors[f"{ATTENTION}.qkv_proj.bias"] = torch.arange(SHAPES[f"{ATTENTION}.qkv_proj"][0]).float()
    save_file(tensors, tmp_path / SINGLE_NAME)
    config = CONFIG | {"bigdl_transformers_low_bit": name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return name, blocks, tmp_path


def check(folder: Path, name: str, blocks: dict[str, np.ndarray], config: object = None) -> None:
    checkpoint = Checkpoint(folder, config)
    format = FORMATS["sym_int4" if name == "woq_int4" else name]
    first = 0
    parts = {
        f"{ATTENTION}.q_proj": HEADS * HEAD_DIM,
        f"{ATTENTION}.k_proj": KV_HEADS * HEAD_DIM,
        f"{ATTENTION}.v_proj": KV_HEADS * HEAD_DIM,
    }
    wanted = [
        (layer, f"{ATTENTION}.qkv_proj", (first := first + size) - size, size)
        for layer, size in parts.items()
    ]
    wanted += [(layer, layer, 0, shape[0]) for layer, shape in SHAPES.items() if "qkv" not in layer]
    for layer, source, start, size in wanted:
        cols = SHAPES[source][1]
        native = read_blocks(blocks[source].reshape(-1, NATIVE_FORMATS[name][1]), name)
        codes = native.codes.reshape(-1, cols)[start : start + size]
        assert checkpoint.shape(f"{layer}.weight") == (size, cols)
        for rows, columns in (((0, size), (0, cols)), ((3, size - 5), (64, cols))):
            weight = checkpoint.read_low_bit(f"{layer}.weight", (rows, columns))
            assert weight.format is format
            flat = {
                plane.name: weight.planes[plane.name].reshape(-1, plane.entries)
                for plane in format.planes
            }
            found = unpack(flat, format.code_bits).view(rows[1] - rows[0], -1)
            assert np.array_equal(found.numpy(), codes[slice(*rows), slice(*columns)])
            for plane, numbers in (("scales", native.scales), ("mins", native.mins)):
                if plane in weight.planes:
                    expected = numbers.reshape(-1, cols // 64)[start : start + size]
                    expected = expected[slice(*rows), columns[0] // 64 :]
                    assert np.array_equal(weight.planes[plane].float().numpy(), expected)
            assert dequantize(weight).isfinite().all()


def test_weights_byte_for_byte(case: tuple[str, dict[str, np.ndarray], Path]) -> None:
    name, blocks, folder = case
    check(folder, name, blocks)
    bias = Checkpoint(folder).read(f"{ATTENTION}.k_proj.bias", ((0, KV_HEADS * HEAD_DIM),))
    assert bias[0] == HEADS * HEAD_DIM


def test_a_pickled_folder_needs_the_flag(case: tuple[str, dict[str, np.ndarray], Path]) -> None:
    name, blocks, folder = case
    (folder / SINGLE_NAME).unlink()
    torch.save(
        {f"{layer}.weight": torch.from_numpy(data.ravel()) for layer, data in blocks.items()},
        folder / "pytorch_model.bin",
    )
    with pytest.raises(ConfigError, match="--allow-pickle"):
        Checkpoint(folder, ServingConfig(model_path=str(folder)))
    check(folder, name, blocks, ServingConfig(model_path=str(folder), allow_pickle=True))


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return print, ("code of a stranger ran",)


@pytest.mark.parametrize("value", [Evil(), [1, 2], {"a": 3}])
def test_a_pickle_of_more_than_tensors(
    value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(value, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin"):
        Checkpoint(tmp_path, ServingConfig(model_path=str(tmp_path), allow_pickle=True))
    assert "stranger" not in capsys.readouterr().out


@pytest.mark.parametrize("low_bit", ["q4_k", "sym_int4_rtn", "gguf_iq2_xxs", 3])
def test_formats_that_are_not_there(low_bit: object, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(34, dtype=torch.uint8)}, tmp_path / SINGLE_NAME)
    config = CONFIG | {"bigdl_transformers_low_bit": low_bit}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is not read here"):
        Checkpoint(tmp_path)

"""Nothing in a checkpoint is passed over in silence: understood, or refused by name."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import serving
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.devices import open_device
from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.model.loader import load_model, read_model_config
from autotp_serving.model.save import save_low_bit
from autotp_serving.model.stored_tensors import SINGLE_NAME
from tests.model.checkpoints import save_tiny_llama

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, so that a tensor is easily put in."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"), num_hidden_layers=1)
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """serving.main sets up logging and signals for a process of its own."""
    logger = logging.getLogger("autotp_serving")
    state = (logger.handlers, logger.propagate, logger.level)
    handler = signal.getsignal(signal.SIGINT)
    yield
    logger.handlers, logger.propagate, logger.level = state
    signal.signal(signal.SIGINT, handler)


def put(folder: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    save_file(tensors | {name: tensor}, folder / SINGLE_NAME, metadata={"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(folder: Path) -> None:
    config = ServingConfig(model_path=str(folder), device="cpu", low_bit="bf16")
    device = open_device("cpu", 0).torch_device
    load_model(config, read_model_config(config), LocalRankGroup(), device, lambda x: x)


def save(folder: Path) -> None:
    target = folder.parent / "saved"
    config = ServingConfig(model_path=str(folder), save_low_bit=str(target), low_bit="sym_int4")
    save_low_bit(config, read_model_config(config), LocalRankGroup())


def check_refused(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """By loading, by saving and by --plan, in one line each."""
    for act in (load, save):
        with pytest.raises(ConfigError) as failure:
            act(folder)
        for word in words:
            assert word in str(failure.value)
    assert not (folder.parent / "saved").exists()
    assert serving.main(["--model", str(folder), "--plan", "--device", "cpu"]) == 2
    printed = capsys.readouterr().err
    for word in words:
        assert word in printed


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{UP}.weight_scale_inv", torch.ones(6, 2)),
        (f"{UP}.weight_scale", torch.ones(1)),
        (f"{UP}.input_scale", torch.ones(1)),
        (f"{UP}.qweight", torch.ones(4, 4, dtype=torch.int32)),
        (f"{UP}.SCB", torch.ones(4)),
        ("model.layers.0.self_attn.k_scale", torch.ones(1)),
        ("somewhere.else.v_scale", torch.ones(1)),
    ],
)
def test_parts_of_quantized_weights(
    name: str, tensor: torch.Tensor, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(folder, name, tensor)
    check_refused(folder, capsys, name, "quantized weight", "16-bit original")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        f"{UP}.lora_A.weight",
        "model.norm.bias",
        "lm_head.bias",
    ],
)
def test_what_would_change_the_answers(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(folder, name, torch.ones(4, 4))
    check_refused(folder, capsys, name, "answers would be wrong")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_a_weight_of_a_type_without_meaning(
    dtype: torch.dtype, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weight = load_file(folder / SINGLE_NAME)[f"{UP}.weight"]
    put(folder, f"{UP}.weight", weight.to(dtype))
    check_refused(folder, capsys, f"{UP}.weight", "is stored as", "quantization_config")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(16)),
        ("model.layers.0.attention.masked_bias", torch.ones(1)),
        ("model.layers.7.mlp.up_proj.weight", torch.ones(4, 4)),
        ("visual.blocks.0.weight", torch.ones(4)),
    ],
)
def test_what_does_no_harm(
    name: str, tensor: torch.Tensor, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(folder, name, tensor)
    load(folder)
    assert serving.main(["--model", str(folder), "--plan", "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("quantize_config.json", {"bits": 3, "quant_method": "hqq"}),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}),
        ("hf_quant_config.json", {"quantization": 3}),
        ("config.json", {"quantization_config": {"quant_method": "vptq"}}),
        ("config.json", {"quantization_config": {"bits": 4}}),
        ("config.json", {"quantization_config": []}),
        ("config.json", {"bigdl_transformers_low_bit": "q4_k"}),
    ],
)
def test_a_method_that_is_not_read(
    file: str, text: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / file
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | text))
    check_refused(folder, capsys, file)


def test_a_folder_saved_by_a_version_that_took_codes_for_weights(folder: Path) -> None:
    save(folder)
    saved = folder.parent / "saved"
    set_config(saved, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ConfigError, match="save it again from the checkpoint"):
        load(saved)

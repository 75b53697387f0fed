"""Saving low-bit: what comes back, and what is refused by name. One rank, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.devices import open_device
from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.low_bit.selection import MANIFEST_NAME
from autotp_serving.model.loader import load_model, read_model_config
from autotp_serving.model.save import save_low_bit
from tests.model.checkpoints import save_tiny_llama

INDEX = "model.safetensors.index.json"
NAME = "model.layers.0.mlp.up_proj.weight"


def load(folder: Path, **settings: str) -> torch.nn.Module:
    config = ServingConfig(model_path=str(folder), device="cpu", **settings)
    device = open_device("cpu", 0).torch_device
    return load_model(config, read_model_config(config), LocalRankGroup(), device, lambda x: x)


def save(source: Path, target: Path, **settings: str) -> None:
    config = ServingConfig(model_path=str(source), save_low_bit=str(target), **settings)
    save_low_bit(config, read_model_config(config), LocalRankGroup())


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny_llama"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def saved(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("saved") / "model"
    save(model_path, target, low_bit="sym_int4")
    return target


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_every_byte_is_that_of_converting_while_loading(model_path: Path, saved: Path) -> None:
    converted = load(model_path, low_bit="sym_int4").state_dict()
    reloaded = load(saved).state_dict()
    assert set(converted) == set(reloaded)
    for name, value in converted.items():
        assert torch.equal(value, reloaded[name]), name


def test_no_pickle_is_written(saved: Path) -> None:
    assert {path.suffix for path in saved.iterdir()} <= {".safetensors", ".json", ".jinja"}


def test_an_existing_folder_is_not_overwritten(model_path: Path, saved: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        save(model_path, saved, low_bit="sym_int4")


@pytest.mark.parametrize("low_bit", ["bf16", "fp16"])
def test_a_format_that_converts_nothing(low_bit: str, model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--low-bit that converts"):
        save(model_path, tmp_path / "new", low_bit=low_bit)


def test_another_format_than_the_saved_one(saved: Path) -> None:
    with pytest.raises(ConfigError, match="was saved as sym_int4"):
        load(saved, low_bit="sym_int8")


@pytest.mark.parametrize("text", ["{ damaged", "[]", "{}", '{"version": 1, "low_bit": "x"}'])
def test_a_foreign_manifest(text: str, damaged: Path) -> None:
    (damaged / MANIFEST_NAME).write_text(text)
    with pytest.raises(ConfigError, match=MANIFEST_NAME):
        load(damaged)


def test_a_manifest_of_another_version(damaged: Path) -> None:
    path = damaged / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(ConfigError, match="version 99"):
        load(damaged)


def test_planes_that_do_not_fit_the_manifest(damaged: Path) -> None:
    path = damaged / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["tensors"][NAME]["format"] = "sym_int8"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=f"of {NAME} has shape"):
        load(damaged)


def change_weight(folder: Path, name: str, change: object) -> None:
    """Replace one tensor of an ordinary checkpoint by `change(tensor)`."""
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(value: float, model_path: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model_path, tmp_path / "model"))
    change_weight(broken, NAME, lambda tensor: tensor.index_fill(1, torch.tensor([5]), value))
    with pytest.raises(ConfigError, match=NAME):
        load(broken, low_bit="sym_int4")
    with pytest.raises(ConfigError, match=NAME):
        save(broken, tmp_path / "new", low_bit="sym_int4")
    assert not (tmp_path / "new").exists()


def test_a_shape_that_config_json_does_not_ask_for(model_path: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model_path, tmp_path / "model"))
    change_weight(broken, NAME, lambda tensor: tensor[:-64].contiguous())
    with pytest.raises(ConfigError, match=rf"{NAME} has shape \(640, 256\)"):
        load(broken, low_bit="sym_int4")

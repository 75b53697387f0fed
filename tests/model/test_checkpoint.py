"""Reading a checkpoint: slices as they are in the file, and each kind of damage by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.stored_tensors import SINGLE_NAME
from autotp_serving.model_folder import INDEX_NAME, ModelFolderError

TENSORS = {
    "a.weight": torch.arange(60, dtype=torch.float32).reshape(6, 10),
    "b.weight": torch.arange(24).reshape(2, 3, 4).to(torch.bfloat16),
    "c.bias": torch.arange(7, dtype=torch.float16),
}
SHARDS = {"one.safetensors": ["a.weight"], "two.safetensors": ["b.weight", "c.bias"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and their index."""
    for file, names in SHARDS.items():
        save_file({name: TENSORS[name].clone() for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in SHARDS.items() for name in names}
    write_index(tmp_path, {"metadata": {}, "weight_map": weight_map})
    return tmp_path


def write_index(folder: Path, value: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps(value))


def whole(name: str) -> tuple[tuple[int, int], ...]:
    return tuple((0, size) for size in TENSORS[name].shape)


def check_error(folder: Path, *words: str) -> None:
    with pytest.raises(ModelFolderError) as failure:
        Checkpoint(folder)
    message = str(failure.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_tensors_of_all_shards_by_name(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.names() == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        read = checkpoint.read(name, whole(name))
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_NAME)
    assert Checkpoint(tmp_path).names() == set(TENSORS)


@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        ("a.weight", ((2, 5), (0, 10))),
        ("a.weight", ((0, 6), (3, 4))),
        ("a.weight", ((5, 6), (9, 10))),
        ("b.weight", ((1, 2), (0, 3), (2, 4))),
        ("c.bias", ((6, 7),)),
        ("a.weight", ((3, 3), (0, 10))),
    ],
)
def test_a_slice_is_that_part_of_the_tensor(
    folder: Path, name: str, ranges: tuple[tuple[int, int], ...]
) -> None:
    expected = TENSORS[name][tuple(slice(*part) for part in ranges)]
    read = Checkpoint(folder).read(name, ranges)
    assert torch.equal(read, expected)
    # Were it a view into the mapped file, the blocks around it would stay in memory.
    assert read.untyped_storage().nbytes() == expected.numel() * expected.element_size()


@pytest.mark.parametrize("chunk", [1, 40, 100])
def test_a_tensor_read_in_parts(folder: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotp_serving.model.checkpoint.CHUNK_BYTES", chunk)
    for name, tensor in TENSORS.items():
        assert torch.equal(Checkpoint(folder).read(name, whole(name)), tensor)
    read = Checkpoint(folder).read("a.weight", ((1, 6), (2, 9)))
    assert torch.equal(read, TENSORS["a.weight"][1:6, 2:9])


def test_a_missing_shard(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    check_error(folder, "two.safetensors", INDEX_NAME, "download")


@pytest.mark.parametrize("num_bytes", [0, 4, 20, -8])
def test_a_shard_cut_short(folder: Path, num_bytes: int) -> None:
    path = folder / "two.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    check_error(folder, str(path), "cut short or damaged", "download")


def test_a_shard_that_is_something_else(folder: Path) -> None:
    (folder / "one.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 9)
    check_error(folder, "one.safetensors", "damaged")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{ cut",
        "[]",
        "3",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a.weight": 3}}',
        '{"weight_map": {"a.weight": ["one.safetensors"]}}',
        b"\xff\xfe\x00",
    ],
)
def test_a_damaged_index(folder: Path, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    (folder / INDEX_NAME).write_bytes(data)
    check_error(folder, INDEX_NAME, "download")


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    check_error(tmp_path, ".bin", "convert them to safetensors")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    check_error(tmp_path, str(tmp_path), SINGLE_NAME, INDEX_NAME)

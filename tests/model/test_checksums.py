"""Checksums of a saved low-bit folder: a flipped bit is named, at any number of ranks."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from autotp_serving.distributed.launch import LocalRankGroup
from autotp_serving.low_bit.selection import MANIFEST_NAME
from autotp_serving.model.checkpoint import Checkpoint
from autotp_serving.model.checksums import check_checksums, compute_checksums
from autotp_serving.model.stored_tensors import CheckpointError
from tests.model.checkpoints import save_tiny_llama
from tests.model.test_save import load, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    save(save_tiny_llama(root / "tiny", num_hidden_layers=1), root / "saved", low_bit="asym_int4")
    return root / "saved"


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def list_tensors(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """File and first and last byte of each stored tensor."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = (start + offset for offset in entry["data_offsets"])
                found[name] = (path, first, last - 1)
    return found


def flip_bit(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (value,) = file.read(1)
        file.seek(position)
        file.write(bytes([value ^ (1 << bit)]))


def test_every_stored_tensor_has_one(saved: Path) -> None:
    checksums = json.loads((saved / MANIFEST_NAME).read_text())["crc32"]
    assert set(checksums) == set(list_tensors(saved))
    assert {f"model.layers.0.mlp.up_proj.weight.{plane}" for plane in ("codes", "mins")} < set(
        checksums
    )


def test_an_undamaged_folder_passes_in_silence(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_checksums(Checkpoint(saved), LocalRankGroup())
    assert not caplog.records


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_flipped_bit_anywhere_is_named_by_one_rank_of_the_host(damaged: Path, size: int) -> None:
    rng = random.Random(size)
    for name, (path, first, last) in list_tensors(damaged).items():
        position, bit = rng.choice([first, last, rng.randint(first, last)]), rng.randrange(8)
        flip_bit(path, position, bit)
        checkpoint = Checkpoint(damaged)
        messages = []
        for rank in range(size):
            try:
                # Two hosts of `size` ranks each, of which this is the second.
                check_checksums(checkpoint, LocalRankGroup(size + rank, 2 * size, rank, size))
            except CheckpointError as error:
                messages.append(str(error))
        assert len(messages) == 1 and f"{name} is damaged" in messages[0], name
        assert str(path) in messages[0] and "\n" not in messages[0]
        flip_bit(path, position, bit)
    check_checksums(Checkpoint(damaged), LocalRankGroup())


def test_a_model_with_a_flipped_bit_is_not_loaded(damaged: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight.scales"
    path, first, _ = list_tensors(damaged)[name]
    flip_bit(path, first + 1, 6)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load(damaged)


def test_another_type_or_shape_for_the_same_bytes_is_seen(damaged: Path) -> None:
    name = "model.norm.weight"
    path, _, _ = list_tensors(damaged)[name]
    data = path.read_bytes()
    before = compute_checksums(path)[name]
    assert data.count(b'"BF16"') >= 1
    position = data.index(b'"BF16"', data.index(f'"{name}"'.encode()))
    path.write_bytes(data[:position] + b'"I16" ' + data[position + 6 :])
    assert compute_checksums(path)[name] != before
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        check_checksums(Checkpoint(damaged), LocalRankGroup())


def change_manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: one for key, one in manifest.items() if one is not None}))


def test_a_folder_saved_without_checksums_loads_and_says_so(
    damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_manifest(damaged, crc32=None)
    load(damaged)
    (record,) = caplog.records
    assert "was saved without checksums" in record.message


def test_a_tensor_without_checksum(damaged: Path) -> None:
    checksums = json.loads((damaged / MANIFEST_NAME).read_text())["crc32"]
    del checksums["model.norm.weight"]
    change_manifest(damaged, crc32=checksums)
    with pytest.raises(CheckpointError, match=r"no checksum of model\.norm\.weight"):
        load(damaged)


@pytest.mark.parametrize("value", [[], 5, "x", {"model.norm.weight": 7}])
def test_checksums_that_are_none(damaged: Path, value: object) -> None:
    change_manifest(damaged, crc32=value)
    with pytest.raises(CheckpointError, match=MANIFEST_NAME):
        Checkpoint(damaged)

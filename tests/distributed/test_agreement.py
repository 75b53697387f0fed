"""Hosts that do not serve the same model, or not in the same way, are told so before they load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.distributed.agreement import check_agreement, fingerprint
from autotp_serving.distributed.launch import LocalRankGroup


class RecordedRankGroup(LocalRankGroup):
    """Rank 1 of two; what rank 0 gave is known."""

    def __init__(self, first: Any, local_size: int) -> None:
        super().__init__(1, 2, 0, local_size)
        self._first = first

    def all_gather(self, value: Any) -> list[Any]:
        return [self._first, value]


class NotingRankGroup(LocalRankGroup):
    """Rank 0 of two, which notes what it gave."""

    def __init__(self, local_size: int) -> None:
        super().__init__(0, 2, 0, local_size)
        self.given: Any = None

    def all_gather(self, value: Any) -> list[Any]:
        self.given = value
        return [value, value]


def check_pair(first: ServingConfig, second: ServingConfig, local_size: int = 1) -> None:
    """Two ranks compare themselves: on two hosts, or with `local_size` 2 on one."""
    lead = NotingRankGroup(local_size)
    check_agreement(first, lead)
    check_agreement(second, RecordedRankGroup(("alpha", *lead.given[1:]), local_size))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model-1.safetensors").write_bytes(bytes(range(256)) * 256)
    (folder / "model-2.safetensors").write_bytes(b"small")
    return folder


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "elsewhere" / "copy")


def test_a_copy_at_another_place_is_the_same_model(model: Path, copy: Path) -> None:
    check_pair(
        ServingConfig(model_path=str(model), port=8000, api_key=("secret",)),
        ServingConfig(model_path=str(copy), port=9000),
    )


@pytest.mark.parametrize("offset", [0, 256 * 128, 256 * 256 - 1])
def test_other_weights_in_files_of_the_same_size_are_another_model(
    offset: int, model: Path, copy: Path
) -> None:
    weights = bytearray((copy / "model-1.safetensors").read_bytes())
    weights[offset] ^= 1
    (copy / "model-1.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match=f"'{copy}' on host .* copy the same model to all hosts"):
        check_pair(ServingConfig(model_path=str(model)), ServingConfig(model_path=str(copy)))


def test_config_files_and_their_names_count(model: Path, copy: Path) -> None:
    before = fingerprint(copy)
    assert before == fingerprint(model)
    (copy / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    changed = fingerprint(copy)
    (copy / "model-2.safetensors").rename(copy / "model-3.safetensors")
    assert len({before, changed, fingerprint(copy)}) == 3


def test_on_one_host_the_files_are_not_read(tmp_path: Path) -> None:
    check_pair(*[ServingConfig(model_path=str(tmp_path / "none"))] * 2, local_size=2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"block_size": 32}, "--block-size is 16 on rank 0 and 32 on rank 1"),
        ({"max_model_len": 100}, "--max-model-len is not set on rank 0 and 100 on rank 1"),
        ({"modules_to_not_convert": ("a", "b")}, "is empty on rank 0 and a,b on rank 1"),
    ],
)
def test_a_setting_that_differs_is_named(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"{sentence}: give all ranks the same"):
        check_pair(
            ServingConfig(model_path="x"), ServingConfig(model_path="x", **settings), local_size=2
        )


def test_a_setting_that_differs_between_hosts_is_named_with_the_host(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "beta")
    with pytest.raises(ConfigError, match="fp16 on rank 1 on host beta"):
        check_pair(
            ServingConfig(model_path=str(model), low_bit="bf16"),
            ServingConfig(model_path=str(model), low_bit="fp16"),
        )

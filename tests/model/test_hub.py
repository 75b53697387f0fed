"""Names on a hub: what is one, which files are fetched, and what is said when they do not come."""

from __future__ import annotations

import errno
import shutil
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.distributed.launch import LaunchError, LocalRankGroup
from autotp_serving.model.hub import progress
from autotp_serving.model.hub.names import (
    HubName,
    choose_gguf,
    choose_small_files,
    is_complete,
    list_index,
    parse_hub_name,
)
from autotp_serving.model.hub.progress import check_room, try_again, watch_download
from autotp_serving.model.hub.refusals import explain
from autotp_serving.model.source import resolve_model

TINY = HubName("org/tiny", "org/tiny", None, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", ("meta-llama/Llama-2-7b-chat-hf", None, None)),
        ("org/tiny-GGUF:Q4_K_M", ("org/tiny-GGUF", "Q4_K_M", None)),
        ("org/tiny/sub/m.Q8_0.gguf", ("org/tiny", None, "sub/m.Q8_0.gguf")),
        *((text, None) for text in ("/no/such/folder", "./a/b", "../a", "a/b/c", "a", "a//b")),
        *((text, None) for text in ("a/b/", "~/a", "a/..", "org/a--b", "org/a.git", "a b/c", "")),
    ],
)
def test_what_is_a_name(text: str, expected: Any) -> None:
    found = parse_hub_name(text)
    assert (found and (found.repo, found.quant, found.file)) == expected


def test_small_files_are_those_that_are_read() -> None:
    wanted = ["LICENSE", "config.json", "merges.txt", "tokenizer.model", "vocab.json"]
    wanted += ["additional_chat_templates/tool_use.jinja", "1_Pooling/config.json"]
    others = ["README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors"]
    others += ["original/params.json", "onnx/model.onnx", "modeling.py", "m.gguf", "a/b/c.jinja"]
    others += ["2_Dense/config.json", "1_Pooling/model.safetensors"]
    sizes = dict.fromkeys(wanted + others, 10)
    assert choose_small_files(sizes, with_code=False) == sorted(wanted)
    assert choose_small_files(sizes, with_code=True) == sorted([*wanted, "modeling.py"])
    with pytest.raises(ConfigError, match=r"vocab\.json"):
        choose_small_files(sizes | {"vocab.json": 2**40}, with_code=False)


def test_the_gguf_file_that_is_asked_for() -> None:
    parts = [f"big-BF16-0000{number}-of-00002.gguf" for number in (1, 2)]
    names = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "sub/m.q8_0.gguf", "mmproj-Q8_0.gguf", *parts]
    sizes = dict.fromkeys(names, 1)

    def choose(text: str) -> list[str]:
        name = parse_hub_name(text)
        assert name is not None
        return choose_gguf(sizes, name)

    assert choose("a/b:Q4_K_M") == ["m-Q4_K_M.gguf"]
    assert choose("a/b:Q8_0") == ["sub/m.q8_0.gguf"]
    assert choose("a/b:bf16") == parts
    assert choose("a/b/sub/m.q8_0.gguf") == ["sub/m.q8_0.gguf"]
    for text in ("a/b:Q4", "a/b:Q6_K", "a/b/none.gguf"):
        with pytest.raises(ConfigError, match=r"m-Q4_K_M.gguf, .*name one as a/b/FILE.gguf"):
            choose(text)


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "x.bin"}}'),
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": "/x.safetensors"}}',
    ],
)
def test_an_index_that_leads_elsewhere(content: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(ConfigError):
        list_index(path)


def test_a_folder_without_all_its_weights_is_incomplete(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert is_complete(tmp_path, False) and not is_complete(tmp_path, True)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    assert not is_complete(tmp_path, True)
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "nothing")
    assert not is_complete(tmp_path, True)
    (tmp_path / "nothing").touch()
    assert is_complete(tmp_path, True)


def test_a_full_disk_is_seen_before_and_during(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = types.SimpleNamespace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    check_room("org/tiny", 10**9, tmp_path / "not" / "there", "HF_HOME")
    with pytest.raises(ConfigError, match=r"13\.5 GB.* 1\.0 GB free.*HF_HOME"):
        check_room("org/tiny", 13_500_000_000, tmp_path, "HF_HOME")
    error = OSError(errno.ENOSPC, "No space left on device")
    line = str(explain(error, TINY, None, "https://hub", tmp_path))
    assert "is full" in line and "HF_HOME" in line


def test_a_refused_token_and_an_unknown_error(tmp_path: Path) -> None:
    response = types.SimpleNamespace(status_code=403, headers={}, request=None)
    error = errors.HfHubHTTPError("no", response=response)  # type: ignore[arg-type]
    assert "hf auth login" in str(explain(error, TINY, None, "https://hub", tmp_path))
    line = str(explain(ValueError("two\nlines"), TINY, "v1", "https://hub", tmp_path))
    assert "two lines" in line and "hf download org/tiny --revision v1" in line


def test_what_breaks_off_is_tried_again_and_what_is_refused_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    calls = []

    def fetch(error: Exception | None, count: int) -> None:
        calls.append(1)
        if error is not None and len(calls) <= count:
            raise error

    try_again(lambda: fetch(ConnectionError("reset"), 2))
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(ConnectionError):
        try_again(lambda: fetch(ConnectionError("reset"), 9))
    calls.clear()
    with pytest.raises(OSError, match="full"):
        try_again(lambda: fetch(OSError(errno.ENOSPC, "full"), 9))
    assert len(calls) == 1


def test_a_stalled_download_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "STALL_SECONDS", 0.6)
    gone = threading.Event()
    began = time.monotonic()
    with pytest.raises(LaunchError, match="org/tiny: the download has stalled"):
        watch_download("org/tiny", 10**9, tmp_path, lambda: gone.wait(30) and None)
    gone.set()
    assert time.monotonic() - began < 10


def test_what_a_download_raises_comes_out(tmp_path: Path) -> None:
    def fail() -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        watch_download("org/tiny", 1, tmp_path, fail)


def resolve(path: str, **settings: Any) -> ServingConfig:
    return resolve_model(ServingConfig(model_path=path, **settings), LocalRankGroup())


def test_a_path_stays_as_it_is(tmp_path: Path) -> None:
    for path in (str(tmp_path), "/no/such/folder", "./no/such"):
        assert resolve(path).model_path == path
    for settings in ({"revision": "v1"}, {"hub": "modelscope"}):
        with pytest.raises(ConfigError, match="is a path: leave it out"):
            resolve(str(tmp_path), **settings)


def test_modelscope_by_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with the same function stands in: fetches what is asked for, and no more."""
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin"):
        (source / name).write_text("{}")
    asked = []

    def snapshot_download(
        model_id: str, revision: str | None, allow_file_pattern: list[str],
        ignore_file_pattern: list[str],
    ) -> str:  # fmt: skip
        asked.append((model_id, revision))
        cache.mkdir(exist_ok=True)
        for path in source.iterdir():
            if any(path.match(one) for one in allow_file_pattern) and not any(
                path.match(one) for one in ignore_file_pattern
            ):
                shutil.copy(path, cache)
        return str(cache)

    package = types.ModuleType("modelscope")
    package.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", package)
    config = resolve("org/tiny", hub="modelscope", revision="v1", plan=True)
    assert {path.name for path in cache.iterdir()} == {"config.json", "tokenizer.json"}
    config = resolve("org/tiny", hub="modelscope", revision="v1")
    assert config.model_path == str(cache) and config.model_names == ("org/tiny",)
    assert (cache / "model.safetensors").exists() and not (cache / "pytorch_model.bin").exists()
    assert set(asked) == {("org/tiny", "v1")}
    (source / "model.safetensors").unlink()
    (cache / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no model\.safetensors on ModelScope"):
        resolve("org/tiny", hub="modelscope")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ConfigError, match="pip install modelscope"):
        resolve("org/tiny", hub="modelscope")

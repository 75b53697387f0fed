"""A model folder from a stranger: what leads out of it, is no file or has no bound is refused."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from autotp_serving.model_folder import (
    INDEX_NAME,
    MAX_DEPTH,
    MAX_SMALL_BYTES,
    TEMPLATE_FOLDER,
    ModelFolderError,
    check_model_folder,
    find_file,
    read_object,
)

NAMES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "autotp_low_bit.json"),
    *("model.safetensors", "model-00001-of-00002.safetensors", INDEX_NAME, "LICENSE.txt"),
    *("configuration_mine.py", "spiece.model", "tekken.json", "config.4.0.0.json"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def check_refusal(folder: Path, *words: str) -> None:
    with pytest.raises(ModelFolderError) as failure:
        check_model_folder(folder)
    message = str(failure.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def put(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink(missing_ok=True)
    make(path)


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        os.chdir(path.parent)  # an address is shorter than a test's path
        one.bind(path.name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["absolute", "relative", "through a folder", "twice"])
def test_a_link_out_of_the_folder_is_refused_by_name(folder: Path, name: str, way: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_text("{}")
    targets = {
        "absolute": outside / "secret",
        "relative": Path("../outside/secret"),
        "through a folder": Path("sub/secret"),
        "twice": Path("hop"),
    }
    (folder / "sub").symlink_to(outside)
    (folder / "hop").symlink_to(outside / "secret")
    put(folder / name, lambda path: path.symlink_to(targets[way]))
    check_refusal(folder, name, "leads out of the model folder", str(outside / "secret"))


def test_links_within_the_folder_and_a_link_to_the_folder_are_fine(folder: Path) -> None:
    (folder / "real.txt").write_text("x")
    (folder / "tokenizer.model").symlink_to("real.txt")
    (folder.parent / "current").symlink_to(folder)
    check_model_folder(folder)
    check_model_folder(folder.parent / "current")


def test_what_nobody_reads_may_lead_anywhere(folder: Path) -> None:
    (folder / "notes").symlink_to("/etc/passwd")
    (folder / "runs").symlink_to("/tmp")
    os.mkfifo(folder / "pipe")
    for name in ("tokenizer", "LICENSES", "original"):
        (folder / name).mkdir()
    check_model_folder(folder)


def test_the_links_of_a_hugging_face_cache_lead_to_its_own_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--some--model"
    snapshot = repo / "snapshots" / "0123abcd"
    (snapshot / TEMPLATE_FOLDER).mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, name in enumerate(NAMES):
        (repo / "blobs" / f"{number:040x}").write_text("{}")
        (snapshot / name).symlink_to(f"../../blobs/{number:040x}")
    (snapshot / TEMPLATE_FOLDER / "rag.jinja").symlink_to(f"../../../blobs/{0:040x}")
    check_model_folder(snapshot)
    assert find_file(snapshot, "model.safetensors", INDEX_NAME).exists()

    other = tmp_path / "hub" / "models--other--model" / "blobs"
    other.mkdir(parents=True)
    (other / "00").write_text("{}")
    for target in (other / "00", repo / "refs", repo / "blobs" / ".." / "refs"):
        (repo / "refs").write_text("main")
        put(snapshot / "config.json", lambda path, target=target: path.symlink_to(target))
        check_refusal(snapshot, "config.json", "leads out of the model folder")


def test_blobs_beside_a_folder_that_is_no_snapshot_are_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "00").write_text("{}")
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").symlink_to("../../blobs/00")
    check_refusal(folder, "config.json")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is a fifo"),
        (bind_socket, "is a socket"),
        (lambda path: path.symlink_to("nowhere"), "not there"),
        (lambda path: path.symlink_to(path.name), "leads nowhere"),
    ],
    ids=["fifo", "socket", "dangling", "loop"],
)
def test_what_is_no_file_is_refused_unopened(
    folder: Path, name: str, make: Callable[[Path], object], words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    put(folder / name, make)
    check_refusal(folder, name, words)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(".py")])
def test_a_folder_under_the_name_of_a_file(folder: Path, name: str) -> None:
    put(folder / name, Path.mkdir)
    check_refusal(folder, name, "is a folder")


def test_further_chat_templates_are_looked_at_too(folder: Path) -> None:
    (folder / TEMPLATE_FOLDER).mkdir()
    (folder / TEMPLATE_FOLDER / "rag.jinja").symlink_to("/etc/passwd")
    check_refusal(folder, "rag.jinja", "leads out")
    put(folder / TEMPLATE_FOLDER / "rag.jinja", os.mkfifo)
    check_refusal(folder, "rag.jinja", "a fifo")


def test_a_folder_of_chat_templates_elsewhere(folder: Path) -> None:
    (folder.parent / "templates").mkdir()
    (folder / TEMPLATE_FOLDER).symlink_to("../templates")
    check_refusal(folder, TEMPLATE_FOLDER, "leads out")


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("config.json", "may have 8"),
        ("tokenizer.json", "may have 128"),
        ("vocab.txt", "may have 128"),
        ("tokenizer.model", "may have 128"),
        ("chat_template.jinja", "may have 1"),
    ],
)
def test_huge_files_are_refused_unread(folder: Path, name: str, limit: str) -> None:
    with (folder / name).open("wb") as file:
        file.truncate(2**33)
    check_refusal(folder, name, "8192 MiB", limit)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 200_000])
@pytest.mark.parametrize("ends", ["[]", ("{", "}")], ids=["lists", "objects"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_deep_json(folder: Path, name: str, ends: tuple[str, str], depth: int) -> None:
    first = ends[0] if ends[0] == "[" else '{"a":'
    inner = first * (depth - 1) + ("1" if ends[0] == "{" else "") + ends[1] * (depth - 1)
    (folder / name).write_text(f'{{"a":{inner}}}')
    check_refusal(folder, name, f"deeper than {MAX_DEPTH} levels")


def test_a_depth_that_is_allowed(folder: Path) -> None:
    (folder / "config.json").write_text(
        '{"a":' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}"
    )
    check_model_folder(folder)


@pytest.mark.parametrize("text", ["", "{ cut", "[]", "3", "null", b"\xff\xfe\x00", "9" * 9999])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "added_tokens.json"])
def test_what_is_no_json_object(folder: Path, name: str, text: str | bytes) -> None:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    check_refusal(folder, name, "JSON", "download it again")


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../outside", "sub/../../outside", "", "a\0b", "link", "x" * 300, "\ud800",
     "fifo", ".", "not there"],
)  # fmt: skip
def test_names_that_stand_in_a_file(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_text("x")
    (folder / "link").symlink_to(folder.parent / "outside")
    os.mkfifo(folder / "fifo")
    with pytest.raises(ModelFolderError) as failure:
        find_file(folder, name, INDEX_NAME)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("file", "key", "name"),
    [
        ("config.json", "configuration_files", "config.4.0.0.json"),
        ("tokenizer_config.json", "fast_tokenizer_files", "tokenizer.4.0.0.json"),
    ],
)
def test_files_by_version_stay_in_the_folder(folder: Path, file: str, key: str, name: str) -> None:
    (folder.parent / name).write_text("{}")
    for value in ([f"../{name}"], [str(folder.parent / name)], name, [5]):
        (folder / file).write_text(json.dumps({key: value}))
        check_refusal(folder, file)
    (folder / name).write_text("{}")
    (folder / file).write_text(json.dumps({key: [name]}))
    check_model_folder(folder)


def test_an_object_is_read_within_its_limit(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({"a": "x" * MAX_SMALL_BYTES}))
    with pytest.raises(ModelFolderError, match="may have 8"):
        read_object(path)
    assert len(read_object(path, 2 * MAX_SMALL_BYTES)["a"]) == MAX_SMALL_BYTES


def test_a_folder_that_is_not_there_is_left_to_others(tmp_path: Path) -> None:
    check_model_folder(tmp_path / "none")


@pytest.mark.parametrize(("version", "is_refused"), [("4.53.3", True), ("5.23.0", False)])
def test_vocabularies_elsewhere_where_transformers_would_open_them(
    folder: Path, version: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many checkpoints name the place where they were made; transformers 5 passes over it."""
    monkeypatch.setattr("autotp_serving.model_folder.metadata.version", lambda name: version)
    (folder / "tokenizer_config.json").write_text(json.dumps({"vocab_file": "/etc/passwd"}))
    if is_refused:
        check_refusal(folder, "/etc/passwd", "tokenizer_config.json")
    else:
        check_model_folder(folder)

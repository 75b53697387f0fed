"""What may be read of a model folder: bounded, regular files that lie in it. Every rank.

A folder comes from strangers. A link in it, or a name in one of its files, may lead to anything on
this host; a fifo is waited for without end; a JSON file may be nested until a parser gives up.
Everything is looked at before transformers opens a file.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from autotp_serving.config import ConfigError

INDEX_NAME = "model.safetensors.index.json"
TEMPLATE_FOLDER = "additional_chat_templates"

READ_PATTERNS = (
    *("*.json", "*.jinja", "*.safetensors", "*.py", "tokenizer*", "vocab*", "merges*"),
    *("*.model", "*.txt", "*.tiktoken", "*.bpe", "*.spm", "LICENSE*"),
)
"""Names that the server, transformers or --save-low-bit may open."""

FILE_SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt", ".tiktoken", ".bpe", ".spm")
"""Of names that no folder bears: tokenizer/ and LICENSES/ are folders that nobody opens."""

SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "processor_config.json"),
    "preprocessor_config.json",
)
"""JSON objects that are read whole and checked: their size, their depth, that they are objects."""

LARGE_FILES = ("tokenizer*.json", "vocab*", "merges*", "*.model", "*.tiktoken", "*.bpe", "*.spm")

MAX_SMALL_BYTES = 8 * 2**20
MAX_LARGE_BYTES = 128 * 2**20
"""The largest vocabularies that are published take 40 MB, the largest indexes 20 MB."""
MAX_TEMPLATE_BYTES = 2**20
MAX_DEPTH = 64
"""Levels of JSON; what checkpoints hold is less than ten deep."""

# Lists of further files, by the version of transformers that is to read them.
VERSIONED_FILES = {
    "config.json": ("configuration_files",),
    "tokenizer_config.json": ("fast_tokenizer_files",),
}
# Files that transformers 4 opens wherever they are, and transformers 5 only in the folder.
TOKENIZER_FILE_KEYS = ("vocab_file", "merges_file", "tokenizer_file", "spm_file")


class ModelFolderError(ConfigError):
    """A model folder, or a file in it, that cannot be used; the message names it and the cure."""


def check_model_folder(folder: Path) -> None:
    """Refuse a folder in which a file to be read leads elsewhere, or is no file, or is too large.

    A folder that is not there is not judged: whoever reads it says what is missing.

    Raises:
        ModelFolderError: naming the file.
    """
    if not folder.is_dir():
        return
    for path in [*_list(folder), *_list(folder / TEMPLATE_FOLDER)]:
        if path.name == TEMPLATE_FOLDER or any(fnmatch(path.name, one) for one in READ_PATTERNS):
            _check_entry(folder, path)
    for name in SMALL_FILES:
        if (folder / name).exists():
            _check_names(folder, name, read_object(folder / name))


def find_file(folder: Path, name: str, named_by: str = "this server") -> Path:
    """A file of the folder, whose name stands in one of the folder's own files.

    Raises:
        ModelFolderError: it leads out of the folder, is not there or is no regular file.
    """
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelFolderError(
            f"{folder}: {named_by} names {name!r:.200}, which leads out of the model folder: only "
            "files in the folder are read"
        )
    path = folder / name
    check_link(folder, path)
    try:
        is_there = path.exists()
    except (OSError, ValueError):  # no name that a file could have
        is_there = False
    if not is_there:
        raise ModelFolderError(
            f"{folder} lacks {name!r:.200}, which {named_by} names: download the checkpoint again"
        )
    check_regular(path)
    return path


def check_link(folder: Path, path: Path) -> None:
    """Refuse a path that leads out of the folder.

    In a Hugging Face cache the files of `snapshots/REVISION` are links to `blobs` beside
    `snapshots`: those are the folder's own.

    Raises:
        ModelFolderError: naming the path and where it leads.
    """
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, or no name at all
        raise ModelFolderError(f"{folder} holds a name that leads nowhere: {path!r:.200}") from (
            error
        )
    if target.is_relative_to(root):
        return
    if root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs":
        return
    raise ModelFolderError(
        f"{path} leads out of the model folder, to {target}: put the file itself in its place"
    )


def check_regular(path: Path) -> None:
    """Refuse what is no file: to open a fifo may never end.

    Raises:
        ModelFolderError: naming the path and what it is.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ModelFolderError(f"{path} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(mode):
        raise ModelFolderError(f"{path} is {_describe(mode)} and no file: remove it")


def read_object(path: Path, max_bytes: int = MAX_SMALL_BYTES) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        max_bytes: a larger file is refused unread.

    Raises:
        ModelFolderError: no file, too large, no JSON, too deep, or no object.
    """
    check_regular(path)
    _check_size(path, max_bytes)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ModelFolderError(_too_deep(path)) from error
    except (OSError, ValueError) as error:
        raise ModelFolderError(
            f"{path} is not JSON ({_one_line(error)}): download it again"
        ) from error
    if not isinstance(found, dict):
        raise ModelFolderError(f"{path} must hold a JSON object: download it again")
    if not _is_shallow(found):
        raise ModelFolderError(_too_deep(path))
    return found


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise ModelFolderError(f"{folder} cannot be read ({error.strerror})") from error


def _check_entry(folder: Path, path: Path) -> None:
    check_link(folder, path)
    if path.is_dir():
        if path.name.endswith(FILE_SUFFIXES):
            check_regular(path)
        return
    if not path.exists():
        raise ModelFolderError(f"{path} is a link to a file that is not there: download it again")
    check_regular(path)
    if path.name in SMALL_FILES:
        _check_size(path, MAX_SMALL_BYTES)
    elif path.suffix == ".jinja":
        _check_size(path, MAX_TEMPLATE_BYTES)
    elif any(fnmatch(path.name, pattern) for pattern in LARGE_FILES):
        _check_size(path, MAX_LARGE_BYTES)


def _check_size(path: Path, max_bytes: int) -> None:
    num_bytes = path.stat().st_size
    if num_bytes > max_bytes:
        raise ModelFolderError(
            f"{path} has {num_bytes >> 20} MiB, and such a file may have {max_bytes >> 20}: "
            "download it again"
        )


def _check_names(folder: Path, file_name: str, values: dict[str, Any]) -> None:
    """Refuse names of further files that lead out of the folder."""
    names: list[Any] = []
    for key in VERSIONED_FILES.get(file_name, ()):
        found = values.get(key, [])
        if not isinstance(found, list):
            raise ModelFolderError(f"{folder / file_name}: {key} must be a list of names")
        names += found
    if file_name == "tokenizer_config.json" and _opens_any_path():
        names += [values[key] for key in TOKENIZER_FILE_KEYS if values.get(key) is not None]
    for name in names:
        if not isinstance(name, str):
            raise ModelFolderError(f"{folder / file_name} names {name!r:.40}, which is no file")
        find_file(folder, name, file_name)


def _opens_any_path() -> bool:
    return int(metadata.version("transformers").split(".")[0]) < 5


def _is_shallow(value: Any) -> bool:
    """True for at most MAX_DEPTH levels; walks level by level, so depth costs no stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for one in level for child in _children(one)]
        if not level:
            return True
    return False


def _children(value: Any) -> Iterator[Any]:
    members = value.values() if isinstance(value, dict) else value
    return (one for one in members if isinstance(one, dict | list))


def _too_deep(path: Path) -> str:
    return f"{path} is nested deeper than {MAX_DEPTH} levels: download it again"


def _describe(mode: int) -> str:
    kinds = {
        stat.S_IFIFO: "a fifo",
        stat.S_IFSOCK: "a socket",
        stat.S_IFDIR: "a folder",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

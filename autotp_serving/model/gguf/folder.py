"""From GGUF files to a folder that others take for a checkpoint's. One rank of each host.

The folder lies in this user's cache and holds what the file's metadata say, as config.json,
generation_config.json and tokenizer files, and links to the GGUF files, whose tensors stay there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from importlib import metadata as packages
from pathlib import Path

from autotp_serving import __version__
from autotp_serving.config import ConfigError
from autotp_serving.model.gguf.config import make_config, make_generation_config
from autotp_serving.model.gguf.header import GgufError, GgufHeader, read_header
from autotp_serving.model.gguf.tokenizer import make_tokenizer
from autotp_serving.model.hub.names import BESIDE_GGUF, SINGLE_NAME, SPLIT
from autotp_serving.model_folder import INDEX_NAME, check_link, check_regular

MAX_FOLDERS = 32
MAX_PARTS = 1000


def cache_folder() -> Path:
    """Where the folders are kept, none of which a stranger has made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return cache / "autotp_serving" / "gguf"


def find_gguf(path: Path) -> list[Path]:
    """The GGUF file that a path names, with all its parts if it is split.

    Args:
        path: a file, or a folder with one.

    Returns:
        Nothing for a path that leads to something else.

    Raises:
        GgufError: several in a folder, or parts that are missing.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.exists():
            raise GgufError(f"there is no file '{path}': name a GGUF file, or a model's folder")
        return _list_parts(path)
    if not path.is_dir() or any((path / name).exists() for name in (SINGLE_NAME, INDEX_NAME)):
        return []
    files = sorted(one for one in path.glob("*.gguf") if "mmproj" not in one.name)
    first = [one for one in files if not (m := SPLIT.search(one.name)) or int(m[1]) == 1]
    if len(first) > 1:
        names = ", ".join(one.name for one in first)
        raise GgufError(f"{path} holds several GGUF files ({names:.400}): name one by its path")
    if not files:
        return []
    if not first:
        raise GgufError(f"{path} lacks the first part of {files[0].name}: download it again")
    check_link(path, first[0])
    return _list_parts(first[0])


def _list_parts(path: Path) -> list[Path]:
    match = SPLIT.search(path.name)
    if match is None:
        check_regular(path)
        return [path]
    count = int(match[2])
    if not 1 <= count <= MAX_PARTS:
        raise GgufError(f"{path} claims to be one of {count} parts: download it again")
    stem = SPLIT.sub("", path.name)
    parts = [path.with_name(f"{stem}-{one:05d}-of-{count:05d}.gguf") for one in range(1, count + 1)]
    # In a Hugging Face cache the parts may lie in a folder of their own inside the snapshot.
    root = next((one for one in path.parents if one.parent.name == "snapshots"), path.parent)
    for part in parts:
        if not part.exists():
            raise GgufError(f"{part} is missing: download all {count} parts into one folder")
        check_link(root, part)
        check_regular(part)
    return parts


def read_headers(files: list[Path]) -> GgufHeader:
    """The head of a file, or of all its parts together.

    Raises:
        GgufError: a part that does not belong to the others.
    """
    first, *others = [read_header(path) for path in files]
    tensors = dict(first.tensors)
    for path, header in zip(files[1:], others, strict=True):
        if twice := set(tensors) & set(header.tensors):
            raise GgufError(f"{path} holds {min(twice)!r:.80} again: download all parts again")
        tensors |= header.tensors
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise GgufError(
            f"{files[0]}: its parts hold {len(tensors)} tensors, and should {expected}: download "
            "all parts again"
        )
    return GgufHeader(first.metadata, tensors, first.num_bytes)


def convert_metadata(files: list[Path]) -> Path:
    """Write the folder, or find it written.

    Raises:
        GgufError: a file that cannot be served.
        ConfigError: the cache cannot be written.
    """
    beside = [files[0].with_name(name) for name in BESIDE_GGUF]
    beside = [path for path in beside if path.exists()]
    if not any(path.name == "tokenizer.json" for path in beside):
        beside = []
    for path in beside:
        root = next((one for one in path.parents if one.parent.name == "snapshots"), path.parent)
        check_link(root, path)
        check_regular(path)
    root = cache_folder()
    folder = root / _name_folder([*files, *beside])
    if folder.is_dir():
        os.utime(folder)
        return folder
    header = read_headers(files)
    texts = {
        "config.json": json.dumps(make_config(header, files[0]), indent=1),
        "generation_config.json": json.dumps(make_generation_config(header.metadata), indent=1),
    }
    if not beside:
        tokenizer, tokenizer_config = make_tokenizer(header.metadata, files[0])
        texts["tokenizer.json"] = tokenizer
        texts["tokenizer_config.json"] = json.dumps(tokenizer_config, indent=1)
    try:
        root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=root))
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        for path in beside:
            shutil.copyfile(path, partial / path.name)
        for path in files:
            (partial / path.name).symlink_to(path.resolve())
        _put(partial, folder)
        _forget_oldest(root)
    except OSError as error:
        raise ConfigError(
            f"{root} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder that can"
        ) from error
    return folder


def is_converted(folder: Path) -> bool:
    """Whether `convert_metadata` has made this folder, so that its links may lead anywhere."""
    return folder.resolve().parent == cache_folder().resolve()


def list_linked(folder: Path) -> list[Path]:
    """The GGUF files of a folder that `convert_metadata` has made."""
    return sorted(folder.glob("*.gguf"))


def _name_folder(paths: list[Path]) -> str:
    """Changes with the files, and with what makes the folder of them."""
    parts = [__version__, packages.version("transformers"), packages.version("tokenizers")]
    for path in paths:
        found = path.stat()
        parts.append(f"{path.name} {path.resolve()} {found.st_size} {found.st_mtime_ns}")
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    stem = re.sub(r"[^\w.-]", "_", SPLIT.sub("", paths[0].name).removesuffix(".gguf"))
    return f"{stem[:80]}-{digest}"


def _put(partial: Path, folder: Path) -> None:
    """Give a folder its name; another process may have been quicker with the same."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)


def _forget_oldest(root: Path) -> None:
    """Keep the folders that were used last."""

    def used_at(path: Path) -> float:
        return path.stat().st_mtime if path.exists() else 0.0

    for path in sorted(root.iterdir(), key=used_at, reverse=True)[MAX_FOLDERS:]:
        shutil.rmtree(path, ignore_errors=True)


def describe_types(header: GgufHeader) -> str:
    """The types in which most numbers are stored, for the log."""
    sizes: dict[str, int] = {}
    for tensor in header.tensors.values():
        sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.num_bytes
    return ", ".join(sorted(sizes, key=lambda name: -sizes[name]))

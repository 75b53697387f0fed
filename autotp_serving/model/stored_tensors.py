"""What a folder's safetensors hold, from their headers alone. Every rank; no torch, as --plan is
quick.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotp_serving.model_folder import (
    INDEX_NAME,
    MAX_LARGE_BYTES,
    ModelFolderError,
    find_file,
    read_object,
)

SINGLE_NAME = "model.safetensors"

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library itself allows."""

ITEM_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "C64": 64,
}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types whose numbers are the weights themselves."""


class CheckpointError(ModelFolderError):
    """A checkpoint that cannot be read; the message names the file and the cure."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file; `dtype` in the words of safetensors, as F8_E4M3."""

    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of one number, at least one."""
        return max(1, ITEM_BITS[self.dtype] // 8)


def list_stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder, by name.

    Raises:
        ModelFolderError: a file that leads out of the folder, or is none.
        CheckpointError: no safetensors, a shard that is missing, or one that is cut short.
    """
    found: dict[str, StoredTensor] = {}
    for path in list_weight_files(folder):
        found |= read_stored_tensors(path)
    return found


def has_weights(folder: Path, with_pickled: bool = False) -> bool:
    """True for a folder with safetensors; to plan, config.json and an index may be all there is.

    Args:
        with_pickled: pickled weights count, too.
    """
    if with_pickled and list(folder.glob("pytorch_model*.bin")):
        return True
    return any(folder.glob("*.safetensors"))


def list_weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model.

    Raises:
        ModelFolderError, CheckpointError: as `list_stored_tensors`.
    """
    index_path = folder / INDEX_NAME
    if index_path.exists():
        index = read_object(find_file(folder, INDEX_NAME), MAX_LARGE_BYTES)
        try:
            files = sorted(set(index["weight_map"].values()))
            "".join(files)  # all of them are names
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index_path} is no safetensors index ({error!r}): download it again"
            ) from error
        return [find_file(folder, name, INDEX_NAME) for name in files]
    if (folder / SINGLE_NAME).exists():
        return [find_file(folder, SINGLE_NAME)]
    if list(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} holds pickled weights (.bin), which can run code when loaded: "
            "convert them to safetensors first (save_pretrained in transformers does), or, if you "
            "know where they are from, add --allow-pickle"
        )
    raise CheckpointError(f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}")


def read_stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        CheckpointError: the header is damaged, or the file not as long as it says.
    """
    try:
        header, num_data_bytes = _read_header(path)
        found = {}
        end = 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            found[name], stop = _read_entry(path, entry)
            end = max(end, stop)
        if end != num_data_bytes:
            raise ValueError(f"{num_data_bytes} bytes of data, its header asks for {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({_one_line(error)}): it is cut short or damaged, download it "
            "again"
        ) from error
    return found


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes of data follow it."""
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{num_bytes} bytes in all")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, num_bytes - 8):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, num_bytes - 8 - length


def _read_entry(path: Path, entry: dict[str, Any]) -> tuple[StoredTensor, int]:
    """A tensor, and where its bytes end."""
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in ITEM_BITS:
        raise ValueError(f"type {dtype!r:.40}")
    if any(type(size) is not int or size < 0 for size in (*shape, start, stop)):
        raise ValueError(f"shape {shape!r:.80}")
    if (stop - start) * 8 != math.prod(shape) * ITEM_BITS[dtype]:
        raise ValueError(f"{stop - start} bytes for {dtype} {list(shape)!r:.80}")
    return StoredTensor(path, dtype, shape), stop


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

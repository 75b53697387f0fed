"""Weights in pickled files (pytorch_model.bin), with --allow-pickle only. Every rank.

torch reads them with `weights_only`, which makes tensors and containers and runs no other code, and
maps the file, so that a slice costs its own bytes. Files from before torch 1.6 cannot be mapped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autotp_serving.model.stored_tensors import CheckpointError, StoredTensor
from autotp_serving.model_folder import MAX_LARGE_BYTES, find_file, read_object

PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the words of safetensors."""


def list_pickled_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's pickled files, by name.

    Raises:
        ModelFolderError: a file that leads out of the folder, or is none.
        CheckpointError: a file that cannot be read, or holds anything but tensors.
    """
    found: dict[str, StoredTensor] = {}
    for path in _list_files(folder):
        for name, value in _load(path).items():
            if not isinstance(value, Tensor) or value.dtype not in DTYPES:
                raise CheckpointError(f"{path} holds {name!r:.80}, which is no tensor of a model")
            found[str(name)] = StoredTensor(path, DTYPES[value.dtype], tuple(value.shape))
    return found


def read_pickled(path: Path, name: str, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    """Copy one block of a tensor."""
    part = _load(path)[name][tuple(slice(start, stop) for start, stop in ranges)]
    return part.detach().clone(memory_format=torch.contiguous_format)


def _list_files(folder: Path) -> list[Path]:
    if (folder / PICKLED_INDEX_NAME).exists():
        index = read_object(find_file(folder, PICKLED_INDEX_NAME), MAX_LARGE_BYTES)
        try:
            names = sorted(set(index["weight_map"].values()))
            "".join(names)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / PICKLED_INDEX_NAME} is no index ({error!r}): download it again"
            ) from error
        return [find_file(folder, name, PICKLED_INDEX_NAME) for name in names]
    return [find_file(folder, PICKLED_NAME)]


def _load(path: Path) -> dict[Any, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever an unpickler makes of a foreign file
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {reason[:200]}): it is damaged, holds "
            "more than tensors, or is older than torch 1.6; get safetensors"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no tensors by name: get safetensors")
    return found

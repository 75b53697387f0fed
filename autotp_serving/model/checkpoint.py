"""Read slices of a Hugging Face safetensors checkpoint. Every rank reads only what it keeps.

Each read opens the file anew: a file kept open would keep every page it ever touched in this
process's resident set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from autotp_serving.config import ConfigError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class CheckpointError(ConfigError):
    """A checkpoint that cannot be read; the message names the file and the cure."""


class Checkpoint:
    """The tensors of one model folder, by name.

    Raises:
        CheckpointError: no safetensors, a shard that is missing, or one that is cut short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in self._list_files():
            with self._open(path) as tensors:
                for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                    self._file_of[name] = path
                    self._shapes[name] = tuple(tensors.get_slice(name).get_shape())

    def _list_files(self) -> list[Path]:
        index_path = self.folder / INDEX_NAME
        if index_path.exists():
            try:
                files = sorted(set(json.loads(index_path.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{index_path} is no safetensors index: {error}") from error
            for name in files:
                if not (self.folder / name).exists():
                    raise CheckpointError(
                        f"{self.folder} lacks {name}, which {INDEX_NAME} names: "
                        "download the checkpoint again"
                    )
            return [self.folder / name for name in files]
        if (self.folder / SINGLE_NAME).exists():
            return [self.folder / SINGLE_NAME]
        if list(self.folder.glob("*.bin")):
            raise CheckpointError(
                f"{self.folder} holds pickled weights (.bin), which can run code when loaded: "
                "convert them to safetensors first (save_pretrained in transformers does)"
            )
        raise CheckpointError(f"{self.folder} holds no {SINGLE_NAME} and no {INDEX_NAME}")

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}): it is cut short or damaged, download it again"
            ) from error

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shapes[name]

    def read(self, name: str, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """Copy one block of a tensor into host memory.

        Args:
            name: the tensor.
            ranges: (start, stop) of each dimension.
        """
        with self._open(self._file_of[name]) as tensors:
            part = tensors.get_slice(name)[tuple(slice(start, stop) for start, stop in ranges)]
            # A view would keep the file mapped, and the pages around the slice resident.
            return part.clone()

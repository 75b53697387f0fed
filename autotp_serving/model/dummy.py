"""A checkpoint made of a config.json alone, its weights small random numbers. Every rank.

`--load-format dummy` measures speed and memory with it, and `--plan` learns the names and shapes
of a model's tensors from it. A number depends on the tensor's name and on its place in the whole
tensor only, so all numbers of ranks serve the same model.
"""

from __future__ import annotations

import functools
import math
import zlib
from pathlib import Path
from typing import Any

import torch

from autotp_serving.model.build import build_on_meta
from autotp_serving.model.checkpoint import Ranges

WEIGHT_STD = 0.02
ROW_GROUP = 64
"""Rows that follow each other in the table."""

TABLE_SIZE = 2**22 - 3
"""Random numbers that all tensors are cut from: to draw each number would take most of a start. No
multiple of a row's length."""


class DummyCheckpoint:
    """Looks like `Checkpoint`; nothing of it is stored anywhere."""

    low_bit = None
    is_quantized = False

    def __init__(self, folder: Path, model_config: Any, trust_remote_code: bool) -> None:
        self.folder = folder
        model = build_on_meta(model_config, torch.bfloat16, trust_remote_code)
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shapes[name]

    def hide(self, names: set[str]) -> None:
        """Let these tensors be named no more."""
        self._shapes = {name: one for name, one in self._shapes.items() if name not in names}

    def itemsize(self, name: str) -> int:
        """Bytes of one number."""
        return torch.bfloat16.itemsize

    def low_bit_format(self, name: str) -> None:
        """No tensor is stored converted."""
        return

    def describe_quantized(self) -> list[str]:
        """Nothing is stored, so nothing is quantized."""
        return []

    def describe_loss(self) -> None:
        """Nothing is converted again."""
        return

    def read(self, name: str, ranges: Ranges, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Make one block of a tensor: ones for norms, zeros for biases.

        Args:
            name: the tensor.
            ranges: (start, stop) of each dimension.
            dtype: of the result; the numbers are those of bfloat16.
        """
        return self._make(name, ranges).to(dtype)

    def _make(self, name: str, ranges: Ranges) -> torch.Tensor:
        sizes = [stop - start for start, stop in ranges]
        if "norm" in name and name.endswith("weight"):
            return torch.ones(sizes, dtype=torch.bfloat16)
        if len(sizes) < 2 or name.endswith("bias"):
            return torch.zeros(sizes, dtype=torch.bfloat16)
        (start, stop), *others = ranges
        inner = tuple(slice(*bounds) for bounds in others)
        tensor = torch.empty(sizes, dtype=torch.bfloat16)
        num_rows, *row_shape = self._shapes[name]
        for group in range(start // ROW_GROUP, -(-stop // ROW_GROUP)):
            first, last = group * ROW_GROUP, min((group + 1) * ROW_GROUP, num_rows)
            numbers = self._draw(f"{name}/{group}", (last - first) * math.prod(row_shape))
            rows = numbers.view(last - first, *row_shape)
            low, high = max(first, start), min(last, stop)
            own = rows[(slice(low - first, high - first), *inner)]
            tensor[low - start : high - start] = own
        return tensor

    def _draw(self, name: str, number: int) -> torch.Tensor:
        """So many numbers that are always the same for a name."""
        start = zlib.crc32(name.encode()) % TABLE_SIZE
        if number <= TABLE_SIZE:
            return self._table[start : start + number]
        own = self._table[start : start + TABLE_SIZE]
        return own.repeat(-(-number // TABLE_SIZE))[:number]

    @functools.cached_property
    def _table(self) -> torch.Tensor:
        """[2 * TABLE_SIZE], the second half as the first."""
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(TABLE_SIZE, generator=generator) * WEIGHT_STD
        return numbers.bfloat16().repeat(2)

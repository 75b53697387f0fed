"""Read slices of a safetensors checkpoint, 16-bit or quantized. Each rank reads what it keeps.

Each read opens the file anew: a file kept open would keep every page it ever touched in this
process's resident set.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from autotp_serving.config import ServingConfig
from autotp_serving.low_bit.formats import BLOCK, FORMATS, Format, LowBitError, num_blocks
from autotp_serving.low_bit.tensor import LowBitTensor
from autotp_serving.model.leftovers import check_stored, check_type
from autotp_serving.model.manifest import read_manifest
from autotp_serving.model.pickled import list_pickled_tensors, read_pickled
from autotp_serving.model.quantized.methods import QuantizedTensors, find_quantized_tensors
from autotp_serving.model.quantized.settings import Quantization, find_quantization
from autotp_serving.model.quantized.targets import Targets, choose_targets, describe_targets
from autotp_serving.model.quantized.weight import Loss, read_dense, read_low_bit
from autotp_serving.model.shapes import find_dtype_name
from autotp_serving.model.stored_tensors import (
    CheckpointError,
    has_weights,
    list_stored_tensors,
)

CHUNK_BYTES = 2**25
"""Read at once."""

Ranges = tuple[tuple[int, int], ...]


class Checkpoint:
    """The tensors of one model folder, by name.

    A weight that is stored quantized, by --save-low-bit or by others, is one tensor of this class,
    though several on disk.

    Args:
        config: what quantized weights are to become; None leaves that to the folder.

    Attributes:
        low_bit: the --low-bit name the folder was saved with; None for an ordinary checkpoint.
        quantization: what the folder says of weights that others have quantized, or None.
        checksums: of the tensors as stored, by name; None for an ordinary checkpoint, and for one
            saved low-bit before there were any.
        files: where each stored tensor is, by name.

    Raises:
        ModelFolderError: a file that leads out of the folder, or is none.
        CheckpointError: no safetensors, a shard that is missing, or one that is cut short; or a
            tensor that is not understood.
        ConfigError: weights quantized in a way that is not read here.
    """

    def __init__(self, folder: Path, config: ServingConfig | None = None) -> None:
        self.folder = folder
        self.checksums: dict[str, str] | None = None
        self.quantization = find_quantization(folder)
        is_pickled = config is not None and config.allow_pickle and not has_weights(folder)
        self.stored = list_pickled_tensors(folder) if is_pickled else list_stored_tensors(folder)
        self.files = {name: tensor.path for name, tensor in self.stored.items()}
        self._shapes = {name: tensor.shape for name, tensor in self.stored.items()}
        self._itemsizes = {name: tensor.itemsize for name, tensor in self.stored.items()}
        self._views: dict[str, tuple[str, int]] = {}  # where its rows are, and the first of them
        self._slices: dict[str, _Slice] = {}
        self._hidden: set[str] = set()
        self._formats: dict[str, Format] = {}
        self._quantized = QuantizedTensors({})
        self._targets: Targets = {}
        self._loss = Loss()
        self._dense_dtype = torch.float32
        self.low_bit = self._join_planes()
        if self.quantization is not None:
            self._join_quantized(self.quantization, config)
        if self.low_bit is None:  # where checksums know better
            dense = self._shapes.keys() - self._quantized.weights.keys()
            check_stored(self.stored, dense)

    def _join_quantized(self, quantization: Quantization, config: ServingConfig | None) -> None:
        """Let the tensors of each quantized weight count as one."""
        self._quantized = find_quantized_tensors(quantization, self.stored, self._read_stored)
        weights = self._quantized.weights
        self._targets = choose_targets(weights, config)
        if config is not None:
            self._dense_dtype = getattr(torch, find_dtype_name(config))
        for name in self._quantized.consumed:
            del self._shapes[name]
        for name, weight in weights.items():
            self._shapes[name] = weight.shape
            self._itemsizes[name] = self._dense_dtype.itemsize
            target = self._targets[name]
            if target is not None:
                self._formats[name] = target
        for name, (source, start, stop) in self._quantized.views.items():
            if stop > self._shapes[source][0]:
                raise quantization.refuse(
                    f"{source} has {self._shapes[source][0]} rows, fewer than its heads ask for"
                )
            self.add_view(name, source, start, stop)

    @property
    def is_quantized(self) -> bool:
        """True for weights that others have quantized."""
        return self.quantization is not None

    @property
    def main_format(self) -> Format | None:
        """What most of its weights that others have quantized become; None: plain numbers."""
        counts = Counter(target.name for target in self._targets.values() if target is not None)
        return FORMATS[counts.most_common(1)[0][0]] if counts else None

    def describe_quantized(self) -> list[str]:
        """Lines for the log: what becomes of weights that others have quantized."""
        if self.quantization is None:
            return []
        phrases = describe_targets(self._quantized.weights, self._targets)
        lines = [
            f"Quantized by {self.quantization.method} ({self.quantization.source.name}): "
            f"{'; '.join(phrases) or 'no weight'}; all others stay in 16 bits"
        ]
        for reason, names in self._quantized.unneeded.items():
            lines.append(f"{len(names)} tensors are not used: {reason} (as {min(names)})")
        return lines

    def describe_loss(self) -> str | None:
        """A line for the log: what converting again has cost so far; None where nothing was."""
        if not self._loss.num_weights:
            return None
        if not self._loss.errors:
            return (
                f"{self._loss.num_weights} weights that others had quantized were converted again "
                "without loss (none of a sample has moved)"
            )
        return (
            f"{self._loss.num_weights} weights that others had quantized were converted again, "
            f"which moved them by {self._loss.relative:.2%} (root mean square, of a sample): "
            "a --low-bit of more bits moves them less"
        )

    def _join_planes(self) -> str | None:
        """Let the planes of each weight that --save-low-bit converted count as one tensor."""
        manifest = read_manifest(self.folder)
        if manifest is None:
            return None
        if self.quantization is not None:
            raise self.quantization.refuse(
                "this folder was saved low-bit from weights that were quantized already, by a "
                "version that took their codes for weights",
                "save it again from the checkpoint that it was made of",
            )
        self.checksums = manifest.checksums
        for name, (format, shape) in manifest.weights.items():
            for plane in format.planes:
                expected = (shape[0], num_blocks(shape[1]) * plane.entries)
                found = self._shapes.pop(f"{name}.{plane.name}", None)
                if found != expected:
                    raise CheckpointError(
                        f"{self.folder}: plane {plane.name} of {name} has shape {found}, "
                        f"{format.name} asks for {expected}: save the model again"
                    )
            self._formats[name] = format
            self._shapes[name] = shape
        return manifest.low_bit

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
        return set(self._shapes) - self._hidden

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shapes[name]

    def itemsize(self, name: str) -> int:
        """Bytes of one number of a tensor that is not low-bit."""
        return self._itemsizes[name]

    def low_bit_format(self, name: str) -> Format | None:
        """Format of a weight that is stored converted, or becomes so while it is read."""
        return self._formats.get(name)

    def add_view(self, name: str, source: str, start: int, stop: int) -> None:
        """Let rows [start, stop) of a tensor count as one of their own; `source` is named no more.

        A whole tensor is given another name this way.
        """
        self._views[name] = (source, start)
        self._hidden.add(source)
        self._shapes[name] = (stop - start, *self._shapes[source][1:])
        self._itemsizes[name] = self._itemsizes.get(source, 1)
        if source in self._formats:
            self._formats[name] = self._formats[source]

    def hide(self, names: set[str]) -> None:
        """Let these tensors be named no more."""
        self._hidden |= names

    def add_slice(
        self,
        name: str,
        source: str,
        index: int,
        first_row: int,
        num_rows: int,
        *,
        step: int,
        is_transposed: bool,
    ) -> None:
        """Let rows of one of the matrices stacked in a tensor count as a tensor of their own.

        Args:
            source: [number of matrices, rows, columns], or [number of biases, rows]; it is named
                no more.
            index: which matrix.
            first_row, num_rows, step: every so many rows, from which on.
            is_transposed: the matrices in `source` have their rows as columns.
        """
        others = self._shapes[source][1:2] if is_transposed else self._shapes[source][2:]
        self._slices[name] = _Slice(source, index, first_row, step, is_transposed)
        self._hidden.add(source)
        self._shapes[name] = (num_rows, *others)
        self._itemsizes[name] = self._itemsizes[source]

    def read_low_bit(self, name: str, ranges: Ranges) -> LowBitTensor:
        """Copy the rows and columns of a converted weight into host memory.

        Raises:
            LowBitError: the columns would split a block, or numbers that cannot be.
        """
        format = self._formats[name]
        (row_start, row_stop), (col_start, col_stop) = ranges
        whole = col_stop == self._shapes[name][1]
        if col_start % BLOCK or (col_stop % BLOCK and not whole):
            raise LowBitError(f"columns {col_start} to {col_stop} would split a block of {BLOCK}")
        first, last = col_start // BLOCK, num_blocks(col_stop)
        name, first_row = self._views.get(name, (name, 0))
        row_start, row_stop = row_start + first_row, row_stop + first_row
        if name in self._quantized.weights:
            return read_low_bit(
                self._quantized.weights[name],
                format,
                self._read_stored,
                (row_start, row_stop),
                (col_start, col_stop),
                self._loss,
            )
        planes = {}
        for plane in format.planes:
            cols = (first * plane.entries, last * plane.entries)
            planes[plane.name] = self._read_stored(
                f"{name}.{plane.name}", ((row_start, row_stop), cols)
            )
        return LowBitTensor(format, (row_stop - row_start, col_stop - col_start), planes)

    def read(self, name: str, ranges: Ranges, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Copy one block of a tensor into host memory.

        Args:
            name: the tensor.
            ranges: (start, stop) of each dimension.
            dtype: what to make of its numbers, a part at a time; None leaves them as they are.

        Raises:
            CheckpointError: its numbers are not what they stand for.
        """
        if name in self._slices:
            part = self._read_slice(name, ranges)
            return part if dtype is None else part.to(dtype)
        name, first_row = self._views.get(name, (name, 0))
        is_quantized = name in self._quantized.weights
        if not is_quantized:
            check_type(name, self.stored[name])
        if first_row:
            (row_start, row_stop), *others = ranges
            ranges = ((row_start + first_row, row_stop + first_row), *others)
        if is_quantized:
            weight = self._quantized.weights[name]
            return read_dense(weight, dtype or self._dense_dtype, self._read_stored, *ranges)
        found = self._read_stored(name, ranges, dtype)
        return found if dtype is None else found.to(dtype)

    def _read_slice(self, name: str, ranges: Ranges) -> torch.Tensor:
        part = self._slices[name]
        check_type(part.source, self.stored[part.source])
        (row_start, row_stop), *cols = ranges
        rows = (
            part.first_row + row_start * part.step,
            part.first_row + (row_stop - 1) * part.step + 1,
        )
        block = (*cols, rows) if part.is_transposed else (rows, *cols)
        (found,) = self._read_stored(part.source, ((part.index, part.index + 1), *block))
        found = found.T if part.is_transposed else found
        return found[:: part.step].contiguous()

    def _read_stored(
        self, name: str, ranges: Ranges, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The same of a tensor under the name that it has in its file."""
        tensor = self.stored[name]
        sizes = [stop - start for start, stop in ranges]
        num_bytes = math.prod(sizes) * tensor.itemsize
        if num_bytes <= CHUNK_BYTES or len(sizes) < 2:
            return self._read_at_once(name, ranges)
        # Mapped pages count as this process's until the file is closed: a part at a time.
        (start, stop), *others = ranges
        step = max(1, CHUNK_BYTES * sizes[0] // num_bytes)
        found: torch.Tensor | None = None
        for first in range(start, stop, step):
            last = min(first + step, stop)
            part = self._read_at_once(name, ((first, last), *others))
            if found is None:
                found = torch.empty(sizes, dtype=dtype or part.dtype)
            found[first - start : last - start] = part
        assert found is not None, "more bytes than none have rows"
        return found

    def _read_at_once(self, name: str, ranges: Ranges) -> torch.Tensor:
        if self.files[name].suffix == ".bin":
            return read_pickled(self.files[name], name, ranges)
        with self._open(self.files[name]) as tensors:
            if not ranges:
                return tensors.get_tensor(name).clone()
            part = tensors.get_slice(name)[tuple(slice(start, stop) for start, stop in ranges)]
            # A view would keep the file mapped, and the pages around the slice resident.
            return part.clone()


@dataclass(frozen=True)
class _Slice:
    """Every `step`-th row, from `first_row` on, of matrix `index` of those stacked in `source`."""

    source: str
    index: int
    first_row: int
    step: int
    is_transposed: bool

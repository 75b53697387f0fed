"""What a quantized weight of someone else's is here, and how a slice of it is read. Every rank.

A weight is either repacked, its codes in the order of ours and its scales repeated for each block
of 64, or decoded, where no format of ours takes it as it is; what is decoded may be converted again
with the loss measured. Both go a tile of rows at a time, so that a rank holds its slice and a few
megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from autotp_serving.low_bit.formats import BLOCK, FORMATS, Format, num_blocks
from autotp_serving.low_bit.tensor import LowBitTensor, dequantize, quantize

Range = tuple[int, int]
Read = Callable[[str, tuple[Range, ...]], Tensor]
"""Reads (start, stop) of each dimension of a stored tensor, by its name in the file."""

TILE = 2**22
"""Weights read at once."""

SAMPLE_ROWS = 16
"""Rows of each tile that a loss is measured on."""


class QuantizedWeight(Protocol):
    """One weight `[rows, cols]` in its producer's layout.

    Attributes:
        shape: of the whole weight.
        format: what takes it as it is; None where nothing does.
        fallback: what it becomes where nothing does and nobody asks for something else.
        parts: names of the stored tensors that it consists of.

    Where it has an attribute `has_power_of_two_scales` that is true, its scales are such, and so
    are those of the small floats that it is converted to: levels then fall on levels.
    """

    shape: tuple[int, int]
    parts: tuple[str, ...]

    @property
    def format(self) -> Format | None:
        """See the class."""
        ...

    @property
    def fallback(self) -> Format:
        """See the class."""
        ...

    def repack(self, read: Read, rows: Range, cols: Range) -> LowBitTensor:
        """Its rows and columns in `format`; columns fall on blocks of 64, or end the weight.

        Raises:
            LowBitError: numbers that the format, or its own description, does not allow.
        """
        ...

    def decode(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """The same in float32.

        Raises:
            LowBitError: numbers that its own description does not allow.
        """
        ...


@dataclass
class Loss:
    """What converting again cost: squares of weights and of their errors, on a sample of rows."""

    errors: float = 0.0
    weights: float = 0.0
    num_weights: int = 0

    def add(self, before: Tensor, after: LowBitTensor) -> None:
        """Count a tile, float32 `[rows, cols]`, and what it became."""
        rows = min(SAMPLE_ROWS, before.shape[0])
        sample = before[:rows]
        self.errors += (dequantize(after.slice_rows(0, rows)) - sample).square().sum().item()
        self.weights += sample.square().sum().item()

    @property
    def relative(self) -> float:
        """Root mean square error, relative to the weights."""
        return (self.errors / self.weights) ** 0.5 if self.weights else 0.0


def read_low_bit(
    weight: QuantizedWeight, target: Format, read: Read, rows: Range, cols: Range, loss: Loss
) -> LowBitTensor:
    """A slice in `target`, repacked where that is the weight's own format.

    Args:
        rows, cols: the columns fall on blocks of 64, or end the weight.

    Raises:
        LowBitError: numbers that cannot be.
    """
    shape = (rows[1] - rows[0], cols[1] - cols[0])
    blocks = num_blocks(shape[1])
    planes = {
        name: torch.empty(shape[0], blocks * entries, dtype=getattr(torch, dtype))
        for name, dtype, entries in target.planes
    }
    with_powers = getattr(weight, "has_power_of_two_scales", False)
    for start, stop in _list_tiles(rows, shape[1]):
        if target is weight.format:
            tile = weight.repack(read, (start, stop), cols)
        else:
            values = weight.decode(read, (start, stop), cols)
            tile = quantize(values, target, power_of_two_scales=with_powers)
            loss.add(values, tile)
        for name, plane in planes.items():
            plane[start - rows[0] : stop - rows[0]] = tile.planes[name]
    if target is not weight.format:
        loss.num_weights += 1
    return LowBitTensor(target, shape, planes)


def read_dense(
    weight: QuantizedWeight, dtype: torch.dtype, read: Read, rows: Range, cols: Range
) -> Tensor:
    """A slice as plain numbers, at any columns.

    Raises:
        LowBitError: numbers that cannot be.
    """
    first = cols[0] // BLOCK * BLOCK
    last = min(num_blocks(cols[1]) * BLOCK, weight.shape[1])
    values = torch.empty(rows[1] - rows[0], cols[1] - cols[0], dtype=dtype)
    for start, stop in _list_tiles(rows, last - first):
        tile = weight.decode(read, (start, stop), (first, last))
        values[start - rows[0] : stop - rows[0]] = tile[:, cols[0] - first : cols[1] - first]
    return values


def _list_tiles(rows: Range, num_cols: int) -> Iterator[Range]:
    step = max(1, TILE // max(1, num_cols))
    for start in range(rows[0], rows[1], step):
        yield start, min(start + step, rows[1])


def spread(groups: Tensor, group: int, cols: Range) -> Tensor:
    """Repeat what belongs to groups of columns for each block of 64.

    Args:
        groups: [rows, the groups that `cols` touches].
        group: columns of a group, a multiple of 64, or no fewer than there are.
        cols: the blocks' columns.

    Returns:
        [rows, blocks].
    """
    first, last = cols[0] // BLOCK, num_blocks(cols[1])
    index = torch.arange(first, last) * BLOCK // group - cols[0] // group
    return groups.index_select(1, index)


def touched(cols: Range, group: int) -> Range:
    """The groups of columns that a range touches."""
    return cols[0] // group, -(-cols[1] // group)


def as_format(name: str) -> Format:
    """Look a format up that is sure to be there."""
    return FORMATS[name]

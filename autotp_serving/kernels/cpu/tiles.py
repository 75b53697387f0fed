"""The order of bytes that the CPU kernels read: tiles of 16 rows by 64 columns. Every rank.

Within a group of 16 rows each plane is cut into words of 4 bytes, and the words are put in the
order (block, word, row) instead of (row, block, word); scales and mins go as (block, row). So 16
rows' words lie side by side, as VNNI and AMX take them, and a weight is read from front to back.
Rows beyond the last multiple of 16 keep their order. It is the same bytes in the same tensors,
only elsewhere: one copy, and saving puts them back.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from autotp_serving.devices.huge_pages import empty_like
from autotp_serving.low_bit.formats import num_blocks
from autotp_serving.low_bit.tensor import LowBitTensor

ROWS = 16
WORD = 4


@dataclass(frozen=True)
class TiledTensor(LowBitTensor):
    """A converted weight in the order of the CPU kernels."""

    def canonical(self) -> LowBitTensor:
        """The same in the order of formats.py, as a copy."""
        blocks = num_blocks(self.shape[1])
        planes = {name: _untile(plane, blocks) for name, plane in self.planes.items()}
        return LowBitTensor(self.format, self.shape, planes)


def tile(tensor: LowBitTensor) -> TiledTensor:
    """A weight in the order of the CPU kernels, as a copy."""
    blocks = num_blocks(tensor.shape[1])
    planes = {name: _tile(plane, blocks) for name, plane in tensor.canonical().planes.items()}
    return TiledTensor(tensor.format, tensor.shape, planes)


def last_group(tensor: TiledTensor) -> dict[str, Tensor]:
    """The rows beyond the last multiple of 16, as 16 tiled rows of which the others are zero."""
    blocks = num_blocks(tensor.shape[1])
    full = _full_rows(tensor.shape[0])
    planes = {}
    for name, plane in tensor.planes.items():
        group = plane.new_zeros(ROWS, plane.shape[1])
        group[: plane.shape[0] - full] = plane[full:]
        planes[name] = _tile(group, blocks)
    return planes


def _full_rows(rows: int) -> int:
    return rows // ROWS * ROWS


def _tile(plane: Tensor, blocks: int) -> Tensor:
    """`[rows, blocks * entries]` from canonical to tiled order."""
    full = _full_rows(plane.shape[0])
    tiled = empty_like(plane)
    tiled[full:] = plane[full:]
    words, width = _words(plane, blocks)
    source = plane[:full].reshape(-1, ROWS, blocks, words, width)
    target = tiled[:full].view(-1, blocks, words, ROWS, width)
    target.copy_(source.permute(0, 2, 3, 1, 4))
    return tiled


def _untile(tiled: Tensor, blocks: int) -> Tensor:
    """Undo `_tile`."""
    full = _full_rows(tiled.shape[0])
    plane = tiled.new_empty(tiled.shape)
    plane[full:] = tiled[full:]
    words, width = _words(tiled, blocks)
    source = tiled[:full].view(-1, blocks, words, ROWS, width)
    plane[:full].view(-1, ROWS, blocks, words, width).copy_(source.permute(0, 3, 1, 2, 4))
    return plane


def _words(plane: Tensor, blocks: int) -> tuple[int, int]:
    """Words per block, and entries per word: scales and mins move one by one."""
    entries = plane.shape[1] // blocks
    return (1, 1) if entries == 1 else (entries // WORD, WORD)

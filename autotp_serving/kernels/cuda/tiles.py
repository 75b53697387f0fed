"""The order of a low-bit weight's bytes on a CUDA card: tiles of 16 rows by 64 columns.

Ranks on CUDA. A tile holds what the 32 lanes of a warp multiply, lane after lane, so that each
reads 16 bytes (of 4-bit codes) beside those of its neighbours and has them where the tensor cores
want them. Lane 4 * g + t holds rows g and g + 8, and of the tile's columns those numbered
h * 32 + t * 8 + q * 4 + i with h, q of 0, 1 and i of 0 to 3. It is the same information in
tensors of the same sizes, only elsewhere; the last tile of a weight whose rows are no multiple of
16 has rows of zeros.

    plane, bits       order of bytes in a tile
    8                 [h][g][t][row half][q][i]
    4                 [g][t][row half][q][i], h = 0 in the low and h = 1 in the high nibble
    2                 [g][t][row half][i], group h * 2 + q in bits 2 * group and up
    1                 [g][t][i], group of row half in bit row half * 4 + group
    scales, mins      [g][row half]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.low_bit.formats import BLOCK, Format, num_blocks, split_code_bits
from autotp_serving.low_bit.packing import pack, unpack
from autotp_serving.low_bit.tensor import LowBitTensor

ROWS = 16
CHUNK_WEIGHTS = 2**25
"""Weights put in order at once: some hundred megabytes of temporaries."""


@dataclass(frozen=True)
class CudaTensor(LowBitTensor):
    """A converted weight in the order of the CUDA kernels.

    Its planes have the rows of whole tiles: up to 15 more than `shape`.
    """

    def __post_init__(self) -> None:
        """Planes are made by `tile` only: nothing to check."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.planes["codes"].device

    @property
    def padded_rows(self) -> int:
        """Rows of all tiles."""
        return -(-self.shape[0] // ROWS) * ROWS

    def canonical(self) -> LowBitTensor:
        """The same in the order of formats.py, as a copy."""
        rows, cols = self.shape
        parts = [
            _untile({name: plane[start:stop] for name, plane in self.planes.items()}, self.format)
            for start, stop in _chunks(self.padded_rows, num_blocks(cols))
        ]
        planes = {name: torch.cat([part[name] for part in parts])[:rows] for name in self.planes}
        return LowBitTensor(self.format, self.shape, planes)

    def slice_tiles(self, start: int, stop: int) -> CudaTensor:
        """Rows `start` to `stop` as views; `start` is a multiple of 16."""
        last = -(-stop // ROWS) * ROWS
        planes = {name: plane[start:last] for name, plane in self.planes.items()}
        return CudaTensor(self.format, (stop - start, self.shape[1]), planes)


def tile(tensor: LowBitTensor) -> CudaTensor:
    """A weight in the order of the CUDA kernels, as a copy."""
    if isinstance(tensor, CudaTensor):
        return tensor
    rows, cols = tensor.shape
    padded = -(-rows // ROWS) * ROWS
    tiled = {name: plane.new_empty(padded, plane.shape[1]) for name, plane in tensor.planes.items()}
    for start, stop in _chunks(padded, num_blocks(cols)):
        part = {}
        for name, plane in tensor.planes.items():
            source = plane[start : min(stop, rows)]
            if len(source) < stop - start:
                filler = source.new_zeros(stop - start - len(source), source.shape[1])
                source = torch.cat([source, filler])
            part[name] = source
        for name, plane in _tile(part, tensor.format).items():
            tiled[name][start:stop] = plane
    return CudaTensor(tensor.format, tensor.shape, tiled)


def join_tiles(tensors: Sequence[CudaTensor]) -> CudaTensor:
    """Stack weights of one format and as many columns; all but the last have whole tiles."""
    first = tensors[0]
    planes = {name: torch.cat([t.planes[name] for t in tensors]) for name in first.planes}
    return CudaTensor(first.format, (sum(t.shape[0] for t in tensors), first.shape[1]), planes)


def _chunks(rows: int, blocks: int) -> list[tuple[int, int]]:
    step = max(1, CHUNK_WEIGHTS // (blocks * BLOCK * ROWS)) * ROWS
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _tile(planes: dict[str, Tensor], format: Format) -> dict[str, Tensor]:
    """Planes of whole tiles from canonical to tiled order."""
    rows = len(planes["codes"])
    codes = _unpack_rows(planes, format).view(rows // ROWS, 2, 8, -1, 2, 4, 2, 4)
    # [row tile, row half, g, block, h, t, q, i] -> [row tile, block, g, t, row half, h, q, i]
    codes = codes.permute(0, 3, 2, 5, 1, 4, 6, 7)
    low_bits, high_bits = split_code_bits(format.code_bits)
    tiled = {"codes": _pack_lanes(codes & (2**low_bits - 1), low_bits).view(rows, -1)}
    if high_bits:
        tiled["high"] = _pack_lanes(codes >> low_bits, high_bits).view(rows, -1)
    for name in ("scales", "mins"):
        if name in planes:
            view = planes[name].view(rows // ROWS, 2, 8, -1)
            tiled[name] = view.permute(0, 3, 2, 1).reshape(rows, -1)
    return tiled


def _untile(tiled: dict[str, Tensor], format: Format) -> dict[str, Tensor]:
    """Undo `_tile`."""
    rows, row_tiles = len(tiled["codes"]), len(tiled["codes"]) // ROWS
    low_bits, high_bits = split_code_bits(format.code_bits)
    codes = _unpack_lanes(tiled["codes"].view(row_tiles, -1), low_bits)
    if high_bits:
        codes = codes | _unpack_lanes(tiled["high"].view(row_tiles, -1), high_bits) << low_bits
    codes = codes.permute(0, 4, 2, 1, 5, 3, 6, 7).reshape(-1, BLOCK)
    planes = {name: plane.view(rows, -1) for name, plane in pack(codes, format.code_bits).items()}
    for name in ("scales", "mins"):
        if name in tiled:
            view = tiled[name].view(row_tiles, -1, 8, 2)
            planes[name] = view.permute(0, 3, 2, 1).reshape(rows, -1)
    return planes


def _unpack_rows(planes: dict[str, Tensor], format: Format) -> Tensor:
    """Codes [rows, columns] uint8 of canonical planes."""
    low_bits, high_bits = split_code_bits(format.code_bits)
    rows = len(planes["codes"])
    parts = {"codes": planes["codes"].reshape(-1, low_bits * 8)}
    if high_bits:
        parts["high"] = planes["high"].reshape(-1, high_bits * 8)
    return unpack(parts, format.code_bits).view(rows, -1)


def _pack_lanes(codes: Tensor, bits: int) -> Tensor:
    """Codes [row tile, block, g, t, row half, h, q, i] below 2**bits to bytes [row tile, ...]."""
    if bits == 8:
        packed = codes.permute(0, 1, 5, 2, 3, 4, 6, 7)
    elif bits == 4:
        packed = codes[..., 0, :, :] | codes[..., 1, :, :] << 4
    elif bits == 2:
        groups = codes.flatten(5, 6)
        packed = groups[..., 0, :]
        for group in range(1, 4):
            packed = packed | groups[..., group, :] << (2 * group)
    else:
        groups = codes.flatten(4, 6)
        packed = groups[..., 0, :]
        for group in range(1, 8):
            packed = packed | groups[..., group, :] << group
    return packed.reshape(len(codes), -1)


def _unpack_lanes(packed: Tensor, bits: int) -> Tensor:
    """Undo `_pack_lanes`: codes [row tile, block, g, t, row half, h, q, i]."""
    tiles = len(packed)
    if bits == 8:
        return packed.view(tiles, -1, 2, 8, 4, 2, 2, 4).permute(0, 1, 3, 4, 5, 2, 6, 7)
    mask = 2**bits - 1
    if bits == 4:
        view = packed.view(tiles, -1, 8, 4, 2, 2, 4)
        return torch.stack([view & mask, view >> 4], 5)
    if bits == 2:
        view = packed.view(tiles, -1, 8, 4, 2, 4)
        groups = torch.stack([(view >> (2 * group)) & mask for group in range(4)], 5)
        return groups.unflatten(5, (2, 2))
    view = packed.view(tiles, -1, 8, 4, 4)
    return torch.stack([(view >> group) & mask for group in range(8)], 4).unflatten(4, (2, 2, 2))

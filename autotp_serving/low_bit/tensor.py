"""A converted weight, and the conversion to and from it. Same on all ranks and devices.

`quantize` and `dequantize` work through a weight in tiles of rows, so that beside input and
output they need a few megabytes. Blocks do not know their neighbours: the bytes are the same
whatever the tile size, device or sharding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.low_bit.formats import BLOCK, Format, LowBitError, num_blocks
from autotp_serving.low_bit.numerics import check_peak, decode, encode
from autotp_serving.low_bit.packing import pack, unpack

# Weights per tile. On CPU the float32 copy and its few temporaries stay in the L2 cache; on an
# accelerator a tile keeps it busy for about as long as its launches take.
CPU_TILE = 2**18
ACCELERATOR_TILE = 2**22


@dataclass(frozen=True)
class LowBitTensor:
    """A weight `[rows, cols]` as planes `[rows, blocks * entries]`; see formats.py.

    Raises LowBitError at birth when the planes do not fit the format and shape.
    """

    format: Format
    shape: tuple[int, int]
    planes: dict[str, Tensor]

    def __post_init__(self) -> None:
        rows, cols = self.shape
        names = [plane.name for plane in self.format.planes]
        if sorted(self.planes) != sorted(names):
            raise LowBitError(
                f"{self.format.name} has planes {', '.join(names)}, not {', '.join(self.planes)}"
            )
        for name, dtype, entries in self.format.planes:
            plane, shape = self.planes[name], (rows, num_blocks(cols) * entries)
            if plane.shape != shape or plane.dtype != getattr(torch, dtype):
                raise LowBitError(
                    f"plane {name} of a {self.format.name} weight {rows} x {cols} must be {dtype} "
                    f"{shape[0]} x {shape[1]}, not {plane.dtype} {tuple(plane.shape)}"
                )

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self.planes["codes"].device

    @property
    def num_bytes(self) -> int:
        """Bytes of all planes."""
        return self.format.num_bytes(*self.shape)

    def canonical(self) -> LowBitTensor:
        """The same in the order of formats.py, where a kernel has put the bytes in its own."""
        return self

    def slice_rows(self, start: int, stop: int) -> LowBitTensor:
        """Rows `start` to `stop` as views."""
        planes = {name: plane[start:stop] for name, plane in self.canonical().planes.items()}
        return LowBitTensor(self.format, (stop - start, self.shape[1]), planes)

    def to(self, device: torch.device | str) -> LowBitTensor:
        """The same on `device`."""
        planes = {name: plane.to(device) for name, plane in self.canonical().planes.items()}
        return LowBitTensor(self.format, self.shape, planes)

    def to_dict(self, prefix: str) -> dict[str, Tensor]:
        """The planes as `prefix.plane`, for safetensors; format and shape travel as metadata."""
        return {f"{prefix}.{name}": plane for name, plane in self.canonical().planes.items()}


def quantize(
    weight: Tensor, format: Format, *, tile: int | None = None, power_of_two_scales: bool = False
) -> LowBitTensor:
    """Convert a weight `[rows, cols]` of any float dtype, on its own device.

    When `cols` is no multiple of 64 the last block of a row is filled up with the row's last
    weight, which leaves its range as it is. `tile` is the number of weights converted at once.
    `power_of_two_scales` asks for them in formats of small floats (fp4, fp6, fp8_e4m3), for weights
    that lie on such levels already.
    Raises LowBitError when a weight is NaN, infinite or too large for the format's scale.
    """
    rows, cols = weight.shape
    blocks = num_blocks(cols)
    planes = {
        name: torch.empty(rows, blocks * entries, dtype=getattr(torch, dtype), device=weight.device)
        for name, dtype, entries in format.planes
    }
    peak = torch.zeros((), device=weight.device)
    for start, stop in _row_tiles(rows, blocks, weight.device, tile):
        values = weight[start:stop].float()
        if cols % BLOCK:
            filler = values[:, -1:].expand(-1, blocks * BLOCK - cols)
            values = torch.cat([values, filler], 1)
        encoded = encode(values.reshape(-1, BLOCK), format, power_of_two_scales)
        parts = pack(encoded.codes, format.code_bits)
        parts |= {"scales": encoded.scales, "mins": encoded.mins}
        for name, plane in planes.items():
            plane[start:stop] = parts[name].view(stop - start, -1)
        peak = torch.maximum(peak, encoded.peak)
    check_peak(peak.item(), format)
    return LowBitTensor(format, (rows, cols), planes)


def dequantize(
    tensor: LowBitTensor, dtype: torch.dtype = torch.float32, *, tile: int | None = None
) -> Tensor:
    """Turn a converted weight back into `[rows, cols]` of `dtype`, on its own device.

    Computed in float32 and rounded once. `tile` is the number of weights converted at once.
    """
    tensor = tensor.canonical()
    rows, cols = tensor.shape
    blocks = num_blocks(cols)
    weight = torch.empty(rows, cols, dtype=dtype, device=tensor.device)
    for start, stop in _row_tiles(rows, blocks, tensor.device, tile):
        parts = {
            name: tensor.planes[name][start:stop].reshape(-1, entries)
            for name, _, entries in tensor.format.planes
        }
        codes = unpack(parts, tensor.format.code_bits)
        values = decode(codes, parts.get("scales"), parts.get("mins"), tensor.format)
        weight[start:stop] = values.view(stop - start, blocks * BLOCK)[:, :cols]
    return weight


def _row_tiles(
    rows: int, blocks: int, device: torch.device, tile: int | None
) -> list[tuple[int, int]]:
    """Cut `rows` into ranges of about `tile` weights, at least one row each."""
    tile = tile or (CPU_TILE if device == torch.device("cpu") else ACCELERATOR_TILE)
    step = max(1, tile // (blocks * BLOCK))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]

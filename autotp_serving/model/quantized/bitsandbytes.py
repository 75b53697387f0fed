"""Weights as bitsandbytes stores them: nf4 and fp4, double quantized or not, and int8. Every rank.

    weight                   uint8 [rows * cols / 2, 1], the first of two in the high nibble
    weight.absmax            float32 [blocks], or uint8 where it is quantized again
    weight.quant_map         float32 [16], the levels
    weight.nested_absmax     float32 [blocks / nested block], of the quantized absmax
    weight.nested_quant_map  float32 [256], its levels
    weight.quant_state.*     JSON in bytes: shape, block sizes and the offset of absmax

Blocks run along the rows, one row after another. An int8 weight is [rows, cols], its scales SCB
[rows] are the largest weights of each row, which count 127.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autotp_serving.low_bit.formats import BLOCK, Format, LowBitError
from autotp_serving.low_bit.packing import pack
from autotp_serving.low_bit.tensor import LowBitTensor
from autotp_serving.model.quantized.integers import IntegerWeight
from autotp_serving.model.quantized.settings import Quantization
from autotp_serving.model.quantized.weight import QuantizedWeight, Range, Read, as_format, spread
from autotp_serving.model.stored_tensors import StoredTensor

STATE_PREFIX = "quant_state.bitsandbytes__"
MAX_STATE_BYTES = 4096
INT8_TOP = 127.0


@dataclass(frozen=True)
class NestedScales:
    """How absmax is quantized itself: `levels[code] * absmax of its block + offset`.

    Attributes:
        block: numbers of absmax that share one of the second kind.
    """

    block: int
    offset: float


@dataclass(frozen=True)
class FourBitWeight:
    """A weight of levels from a table.

    Attributes:
        name: of the stored weight.
        kind: nf4 or fp4.
        block: weights that share a scale.
        nested: how the scales are quantized; None where they are plain.
    """

    name: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    kind: str
    block: int
    nested: NestedScales | None

    @property
    def format(self) -> Format | None:
        """See QuantizedWeight."""
        fits = self.block % BLOCK == 0 and self.shape[1] % self.block == 0
        return self.fallback if fits and self.kind == "nf4" else None

    @property
    def fallback(self) -> Format:
        """See QuantizedWeight."""
        return as_format(self.kind)

    def repack(self, read: Read, rows: Range, cols: Range) -> LowBitTensor:
        """See QuantizedWeight."""
        levels = torch.tensor(self.fallback.levels, dtype=torch.float32)
        if not torch.allclose(self._read_levels(read), levels, rtol=0, atol=1e-6):
            raise LowBitError(f"{self.name}.quant_map holds other levels than nf4 has")
        codes = self._read_codes(read, rows)[:, cols[0] : cols[1]]
        scales = self._read_scales(read, (rows[0] * self.shape[1], rows[1] * self.shape[1]))
        groups = scales.view(rows[1] - rows[0], -1)
        first, last = cols[0] // self.block, -(-cols[1] // self.block)
        scales = spread(groups[:, first:last], self.block, cols).half()
        if not scales.isfinite().all():
            raise LowBitError(f"{self.name}.absmax is no number, or too large for float16")
        packed = pack(codes.reshape(-1, BLOCK), 4)["codes"].view(len(codes), -1)
        shape = (rows[1] - rows[0], cols[1] - cols[0])
        return LowBitTensor(self.fallback, shape, {"codes": packed, "scales": scales})

    def decode(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """See QuantizedWeight."""
        start, stop = rows[0] * self.shape[1], rows[1] * self.shape[1]
        scales = self._read_scales(read, (start, stop))
        if not scales.isfinite().all():
            raise LowBitError(f"{self.name}.absmax is no number")
        index = torch.arange(start, stop) // self.block - start // self.block
        codes = self._read_codes(read, rows)
        values = self._read_levels(read).index_select(0, codes.flatten().int())
        values *= scales.index_select(0, index)
        return values.view(codes.shape)[:, cols[0] : cols[1]]

    def _read_codes(self, read: Read, rows: Range) -> Tensor:
        """Whole rows, uint8 [rows, cols]."""
        start, stop = rows[0] * self.shape[1], rows[1] * self.shape[1]
        first = start // 2
        data = read(self.name, ((first, -(-stop // 2)), (0, 1)))[:, 0]
        codes = torch.stack([data >> 4, data & 15], 1).flatten()
        return codes[start - 2 * first : stop - 2 * first].view(-1, self.shape[1])

    def _read_levels(self, read: Read) -> Tensor:
        return read(f"{self.name}.quant_map", ((0, 16),)).float()

    def _read_scales(self, read: Read, weights: Range) -> Tensor:
        """Float32, one for each block that a range of all weights touches."""
        blocks = (weights[0] // self.block, -(-weights[1] // self.block))
        stored = read(f"{self.name}.absmax", (blocks,))
        if self.nested is None:
            return stored.float()
        outer = (blocks[0] // self.nested.block, -(-blocks[1] // self.nested.block))
        scales = read(f"{self.name}.nested_absmax", (outer,)).float()
        levels = read(f"{self.name}.nested_quant_map", ((0, 256),)).float()
        index = torch.arange(*blocks) // self.nested.block - outer[0]
        found = levels.index_select(0, stored.int()) * scales.index_select(0, index)
        return found + self.nested.offset


@dataclass(frozen=True)
class RowInt8Weight(IntegerWeight):
    """A weight of signed bytes with the largest weight of each row."""

    def read_codes(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """See IntegerWeight."""
        return read(f"{self.module}.weight", (rows, cols)).view(torch.uint8) ^ 0x80

    def read_scales(self, read: Read, rows: Range, groups: Range) -> Tensor:
        """See IntegerWeight."""
        return read(f"{self.module}.SCB", (rows,)).float()[:, None] / INT8_TOP

    def read_zeros(self, read: Read, rows: Range, groups: Range) -> Tensor | None:
        """See IntegerWeight."""

    def check_index(self, read: Read) -> None:
        """See IntegerWeight."""
        name = f"{self.module}.weight_format"
        if name in self.parts and read(name, ()).item() != 0:
            raise LowBitError(f"{name} names an order that is not row by row: save it again")


def find_bitsandbytes_weights(
    quantization: Quantization, stored: dict[str, StoredTensor], read: Read
) -> dict[str, QuantizedWeight]:
    """All weights in 4 or 8 bits.

    Raises:
        ConfigError: settings or shapes that are not read here.
    """
    found: dict[str, QuantizedWeight] = {}
    for name in stored:
        module, _, last = name.rpartition(".")
        if last == "SCB":
            found[f"{module}.weight"] = _make_int8(quantization, module, stored)
        elif f".{STATE_PREFIX}" in name:
            weight = name.partition(f".{STATE_PREFIX}")[0]
            found[weight] = _make_four_bit(quantization, weight, name, stored, read)
    return found


def _make_int8(
    quantization: Quantization, module: str, stored: dict[str, StoredTensor]
) -> RowInt8Weight:
    weight = stored.get(f"{module}.weight")
    is_matrix = weight is not None and weight.dtype == "I8" and len(weight.shape) == 2
    order = stored.get(f"{module}.weight_format")
    if order is not None and any(size != 1 for size in order.shape):
        raise quantization.refuse(f"{module}.weight_format is no single number")
    if not is_matrix or stored[f"{module}.SCB"].shape != weight.shape[:1]:
        raise quantization.refuse(f"{module} has an SCB, and no int8 weight of as many rows")
    names = (f"{module}.{last}" for last in ("weight", "SCB", "weight_format"))
    return RowInt8Weight(
        module=module,
        shape=weight.shape,
        parts=tuple(name for name in names if name in stored),
        bits=8,
        group=weight.shape[1],
        is_symmetric=True,
    )


def _make_four_bit(
    quantization: Quantization,
    name: str,
    state_name: str,
    stored: dict[str, StoredTensor],
    read: Read,
) -> FourBitWeight:
    kind = state_name.rpartition("__")[2]
    state = stored[state_name]
    if kind not in ("nf4", "fp4") or state.dtype != "U8" or len(state.shape) != 1:
        raise quantization.refuse(f"{state_name} is of a kind that is not read here")
    if state.shape[0] > MAX_STATE_BYTES:
        raise quantization.refuse(f"{state_name} has {state.shape[0]} bytes")
    try:
        values = json.loads(bytes(read(state_name, ((0, state.shape[0]),)).tolist()))
        shape = tuple(_count(size) for size in values["shape"])
        weight = FourBitWeight(
            name=name,
            shape=shape,
            parts=(name, state_name, f"{name}.absmax", f"{name}.quant_map"),
            kind=kind,
            block=_count(values["blocksize"]),
            nested=None,
        )
        if "nested_blocksize" in values:
            offset = float(values.get("nested_offset", 0.0))
            nested = NestedScales(_count(values["nested_blocksize"]), offset)
            more = (f"{name}.nested_absmax", f"{name}.nested_quant_map")
            weight = replace(weight, nested=nested, parts=(*weight.parts, *more))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise quantization.refuse(f"{state_name} cannot be read ({error!r:.80})") from error
    missing = [part for part in weight.parts if part not in stored]
    sizes = _expected_sizes(weight)
    wrong = [part for part, size in sizes.items() if part in stored and stored[part].shape != size]
    if name in stored and stored[name].dtype != "U8":
        raise quantization.refuse(f"{name} keeps its codes in {stored[name].dtype}, not in U8")
    if missing or wrong or len(shape) != 2:
        raise quantization.refuse(
            f"{(*missing, *wrong, name)[0]} is missing, or does not fit {name} of {list(shape)}"
        )
    return weight


def _expected_sizes(weight: FourBitWeight) -> dict[str, tuple[int, ...]]:
    total = 1
    for size in weight.shape:
        total *= size
    blocks = -(-total // weight.block)
    sizes: dict[str, tuple[int, ...]] = {
        weight.name: (-(-total // 2), 1),
        f"{weight.name}.absmax": (blocks,),
        f"{weight.name}.quant_map": (16,),
    }
    if weight.nested is not None:
        sizes[f"{weight.name}.nested_absmax"] = (-(-blocks // weight.nested.block),)
        sizes[f"{weight.name}.nested_quant_map"] = (256,)
    return sizes


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"size {value!r:.20}")
    return value

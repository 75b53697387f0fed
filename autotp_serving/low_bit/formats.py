"""The low-bit formats by name, their planes and their sizes. Same on all ranks, no torch.

A format turns a weight `[rows, cols]` into planes, one tensor per kind of byte. Along `cols` the
weights form blocks of 64, and each block has its own bytes in each plane, so a plane can be sharded
anywhere on dim 0, and on dim 1 at multiples of 64, without unpacking. Nothing in the layout
depends on the device or on the number of ranks.

    plane    dtype    per block of 64 weights
    codes    uint8    the low bits of the codes (8, 4 or 2 of them)
    high     uint8    the bits above those, in formats of 3, 5 and 6 bits
    scales   float16  one (float32 in sym_int8 and fp8_e4m3, none in fp8_e5m2)
    mins     float16  one, in the asymmetric formats

Names, block size, scales and levels are those of ipex-llm 2.2.0 and its native library;
docs/low_bit.md lists what was compared and where rounding is better here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

BLOCK = 64


class LowBitError(ValueError):
    """A format, weight or file that cannot be used; says in one line what and why."""


class Plane(NamedTuple):
    """One tensor of a converted weight: its name, dtype and entries per block of 64 weights."""

    name: str
    dtype: str
    entries: int

    @property
    def num_bytes(self) -> int:
        """Bytes per block."""
        return self.entries * {"uint8": 1, "float16": 2, "float32": 4}[self.dtype]


@dataclass(frozen=True)
class Format:
    """One way to store a weight.

    `kind` says how a code becomes a number:
    `symmetric`   (code - 2**(bits - 1)) * scale; sym_int8: the code as a signed byte * scale
    `asymmetric`  code * scale + min
    `table`       levels[code] * scale; `boundaries` lie halfway between the levels
    `minifloat`   level * scale, where the level is the code's sign, exponent and mantissa bits
                  read as the top of a float16, times `level_unit`; `largest_level` is the largest
    """

    name: str
    kind: str
    code_bits: int
    scale_dtype: str | None = "float16"
    levels: tuple[float, ...] = ()
    boundaries: tuple[float, ...] = ()
    mantissa_bits: int = 0
    largest_level: float = 1.0
    level_unit: float = 1.0

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes in their fixed order."""
        low_bits, high_bits = split_code_bits(self.code_bits)
        planes = [Plane("codes", "uint8", low_bits * BLOCK // 8)]
        if high_bits:
            planes.append(Plane("high", "uint8", high_bits * BLOCK // 8))
        if self.scale_dtype:
            planes.append(Plane("scales", self.scale_dtype, 1))
        if self.kind == "asymmetric":
            planes.append(Plane("mins", "float16", 1))
        return tuple(planes)

    @property
    def block_bytes(self) -> int:
        """Bytes per block of 64 weights, all planes together."""
        return sum(plane.num_bytes for plane in self.planes)

    @property
    def bits_per_weight(self) -> float:
        """Storage per weight in bits, scales and mins included."""
        return self.block_bytes * 8 / BLOCK

    def num_bytes(self, rows: int, cols: int) -> int:
        """Bytes of a converted `[rows, cols]` weight; the last block of a row is kept whole."""
        return rows * num_blocks(cols) * self.block_bytes


def num_blocks(cols: int) -> int:
    """Blocks in a row of `cols` weights; the last one is padded when `cols % 64` is not 0."""
    return -(-cols // BLOCK)


def split_code_bits(code_bits: int) -> tuple[int, int]:
    """Bits of a code held in the planes `codes` and `high`, each a width that divides a byte."""
    return {3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}[code_bits]


# NormalFloat levels of the QLoRA paper (Dettmers et al. 2023, appendix E). The eight of nf3 come
# from the same quantiles; ipex-llm holds them to seven decimals. The boundaries are ipex-llm's to
# the last float32 bit, found by bisection; a weight on one goes to the lower level.
_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
_NF4_BOUNDARIES = (-0.84809643, -0.610632896, -0.45999527, -0.33967942, -0.234607399,
                   -0.137911737, -0.0455250181, 0.0397901498, 0.120255254, 0.203521252,
                   0.292013764, 0.389312536, 0.501663387, 0.64278692, 0.861478388)  # fmt: skip
_NF3 = (-1.0, -0.4786292, -0.2171418, 0.0, 0.1609302, 0.3379152, 0.562617, 1.0)
_NF3_BOUNDARIES = (-0.739314616, -0.347885489, -0.108570896, 0.0804651007, 0.249422714,
                   0.450266123, 0.781308472)  # fmt: skip

# Read as the top of a float16, whose exponent bias is 15, the largest code of fp6 (e3m2) is
# 1.75 * 2**-8 and not 28, and that of fp8_e4m3 is 1.75 and not 448: ipex-llm's scales make up for
# it, which spares kernels a multiplication. Its fp4 (e2m1) counts in plain levels 0.5 to 6.
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("sym_int4", "symmetric", 4),
        Format("asym_int4", "asymmetric", 4),
        Format("sym_int5", "symmetric", 5),
        Format("asym_int5", "asymmetric", 5),
        Format("sym_int8", "symmetric", 8, "float32"),
        Format("nf4", "table", 4, levels=_NF4, boundaries=_NF4_BOUNDARIES),
        Format("nf3", "table", 3, levels=_NF3, boundaries=_NF3_BOUNDARIES),
        Format("fp4", "minifloat", 4, mantissa_bits=1, largest_level=6.0, level_unit=2.0**14),
        Format("fp6", "minifloat", 6, mantissa_bits=2, largest_level=1.75 * 2**-8),
        Format("fp8_e4m3", "minifloat", 8, "float32", mantissa_bits=3, largest_level=1.75),
        Format("fp8_e5m2", "minifloat", 8, None, mantissa_bits=2, largest_level=57344.0),
    )
}

# ipex-llm writes the same bytes for woq_int4 as for sym_int4; ipex-llm only picks another
# kernel for it.
ALIASES = {"fp8": "fp8_e5m2", "woq_int4": "sym_int4"}
UNCONVERTED = ("bf16", "fp16")
NAMES = (*FORMATS, *ALIASES, *UNCONVERTED)


def find_format(name: str) -> Format | None:
    """Look up a `--low-bit` name; None means that weights keep 16 bits (bf16, fp16).

    Raises LowBitError for any other name, ipex-llm's k-quants, imatrix, mixed and NPU formats
    included.
    """
    if name in UNCONVERTED:
        return None
    try:
        return FORMATS[ALIASES.get(name, name)]
    except KeyError:
        raise LowBitError(f"no low-bit format '{name}'; there are {', '.join(NAMES)}") from None


def bits_per_weight(name: str) -> float:
    """Storage per weight in bits of any `--low-bit` name. Raises LowBitError."""
    format = find_format(name)
    return 16.0 if format is None else format.bits_per_weight

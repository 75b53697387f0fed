"""Products with low-bit weights by csrc/, for AMX, AVX-512 (VNNI) and AVX2. Every rank on CPU.

Activations of integer formats and of nf3, nf4 and fp4 become 8-bit integers with a scale per 64;
those of fp6 and fp8 become bfloat16. A token's result is bitwise the same with any number of
threads and any other tokens beside it; but AMX, which takes over from 8 tokens on, sums fp6's and
fp8's products in another order.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from autotp_serving.devices.build import BuildError, best_isa, build_library, isa_flags
from autotp_serving.kernels.cpu.tiles import TiledTensor, last_group, tile
from autotp_serving.low_bit.formats import Format, LowBitError, split_code_bits
from autotp_serving.low_bit.numerics import decode
from autotp_serving.low_bit.tensor import LowBitTensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "low_bit_linear.cpp"

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Weight(ctypes.Structure):
    """AutotpWeight of csrc/low_bit_linear.cpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("mins", ctypes.c_void_p),
        ("last_codes", ctypes.c_void_p),
        ("last_high", ctypes.c_void_p),
        ("last_scales", ctypes.c_void_p),
        ("last_mins", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("unit", ctypes.c_float),
        ("offset", ctypes.c_int32),
    )


class CpuMatmul:
    """Multiplies `x` [tokens, cols] by weights [rows, cols] transposed: [tokens, rows of all].

    Several weights have one format and as many columns; `x` is then made ready once for all.

    Attributes:
        is_exact_at_any_width: whether a token's result never depends on how many there are.

    Raises:
        LowBitError: weights that differ in format or columns.
    """

    def __init__(self, library: ctypes.CDLL, *weights: LowBitTensor) -> None:
        if len({(weight.format, weight.shape[1]) for weight in weights}) != 1:
            raise LowBitError("weights multiplied together must be alike in format and columns")
        format = weights[0].format
        is_float = format.kind == "minifloat" and format.code_bits > 4
        self.is_exact_at_any_width = not is_float or best_isa() != "amx"
        self._multiply = library.autotp_linear
        self.rows = sum(weight.shape[0] for weight in weights)
        self.cols = weights[0].shape[1]
        described = [_describe(weight) for weight in weights]
        self._memory = described
        # The function and what it is given first, for C++ that multiplies by itself.
        self.function = ctypes.cast(self._multiply, ctypes.c_void_p).value
        self.weights = (ctypes.c_void_p * len(weights))(
            *(ctypes.addressof(structure) for structure, _ in described)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """See the class; in the dtype of `x`."""
        dtype = DTYPES.get(x.dtype)
        if dtype is None:
            return self(x.float()).to(x.dtype)
        if x.stride(1) != 1:
            x = x.contiguous()
        tokens = x.shape[0]
        out = x.new_empty(tokens, self.rows)
        failed = self._multiply(
            self.weights,
            len(self.weights),
            x.data_ptr(),
            x.stride(0),
            out.data_ptr(),
            tokens,
            dtype,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory to multiply {tokens} tokens")
        return out


def _describe(weight: LowBitTensor) -> tuple[_Weight, object]:
    """What C++ must know of a weight, and the memory that it points to."""
    tiled = weight if isinstance(weight, TiledTensor) else tile(weight)
    planes = {name: plane.contiguous() for name, plane in tiled.planes.items()}
    last = last_group(tiled)
    table, unit, offset = find_levels(weight.format)
    addresses = {name: plane.data_ptr() for name, plane in planes.items()}
    addresses |= {f"last_{name}": plane.data_ptr() for name, plane in last.items()}
    rows, cols = weight.shape
    structure = _Weight(
        rows=rows, cols=cols, table=table.data_ptr(), unit=unit, offset=offset, **addresses
    )
    return structure, (planes, last, table)


@functools.cache
def load_library(format: Format, isa: str | None = None) -> ctypes.CDLL | None:
    """The compiled kernels of a format for the best instruction set here (or the named one).

    None, and a line in the log, where there are none.
    """
    try:
        flags = (*isa_flags(isa or best_isa()), f"-DFORMAT={_template_arguments(format)}")
        library = ctypes.CDLL(str(build_library("low_bit_linear", SOURCE, flags)))
    except (BuildError, OSError) as error:
        logger.warning(
            "%s weights are multiplied by portable torch, slowly: %s", format.name, error
        )
        return None
    library.autotp_linear.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
    )
    library.autotp_linear.restype = ctypes.c_int
    return library


def _template_arguments(format: Format) -> str:
    """The format as csrc/codes.h writes it; formats that differ in their table only are one."""
    low_bits, high_bits = split_code_bits(format.code_bits)
    if format.kind in ("symmetric", "asymmetric"):
        kind = "kCodes"
    else:
        kind = "kTable" if format.code_bits <= 4 else "kPairs"
    scale = {"float16": "kHalf", "float32": "kFloat", None: "kNone"}[format.scale_dtype]
    mins = "true" if format.kind == "asymmetric" else "false"
    return f"{low_bits}, {high_bits}, Kind::{kind}, Scale::{scale}, {mins}"


@functools.cache
def find_levels(format: Format) -> tuple[Tensor, float, int]:
    """A format's table, what one step of the codes is worth, and the code that stands for 0."""
    if format.kind == "symmetric":
        return torch.zeros(0, dtype=torch.uint8), 1.0, 2 ** (format.code_bits - 1)
    if format.kind == "asymmetric":
        return torch.zeros(0, dtype=torch.uint8), 1.0, 0
    codes = torch.arange(2 ** min(format.code_bits, 7), dtype=torch.uint8)
    levels = decode(codes[:, None], None, None, format).flatten()
    if format.code_bits > 4:
        # As the upper and lower bytes of bfloat16, which holds each level exactly. In formats of
        # 8 bits the eighth is the sign, which the kernel adds.
        pairs = levels.bfloat16().view(torch.uint8).view(-1, 2)
        table = torch.zeros(2, 128, dtype=torch.uint8)
        table[0, : len(codes)], table[1, : len(codes)] = pairs[:, 1], pairs[:, 0]
        return table, 1.0, 0
    unit = _finest_unit(levels)
    table = torch.zeros(16, dtype=torch.uint8)
    table[: len(codes)] = torch.round(levels / unit).int() + 128
    return table, unit, 128


def _finest_unit(levels: Tensor) -> float:
    """The step of which all levels are nearly -127 to 127 multiples: exactly in fp4, within
    0.2 % of the largest in nf3 and nf4.
    """
    peak = float(levels.abs().max())
    units = peak / torch.arange(64, 127.01, 0.01, dtype=torch.float64)
    multiples = levels.double() / units[:, None]
    errors = (multiples - multiples.round()).mul_(units[:, None]).square().mean(1)
    return float(units[errors.argmin()])

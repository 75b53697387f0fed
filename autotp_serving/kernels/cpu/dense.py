"""Products with dense weights of 16 bits by csrc/dense_linear.cpp. Every rank on CPU.

bfloat16 where torch has no AMX tiles for it, and float16 where its oneDNN has no instructions for
it: any number of tokens. A token's result does not depend on how many there are.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autotp_serving.devices import huge_pages
from autotp_serving.devices.build import BuildError, best_isa, build_library, isa_flags

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "dense_linear.cpp"
DTYPES = {torch.bfloat16: 1, torch.float16: 2}
ROWS, COLS = 16, 32  # of a panel: what is packed together


@dataclass(frozen=True)
class PackedWeight:
    """A weight [rows, cols] in the order in which the kernel reads it.

    Attributes:
        shape: rows and cols.
        numbers: [rows * cols] and more, both rounded up to whole panels; in huge pages.
    """

    shape: tuple[int, int]
    numbers: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight's numbers."""
        return self.numbers.dtype

    def select_rows(self, start: int, stop: int) -> PackedWeight:
        """A view of rows from a multiple of 16 on."""
        row_size = -(-self.shape[1] // COLS) * COLS
        return PackedWeight((stop - start, self.shape[1]), self.numbers[start * row_size :])


class _Dense(ctypes.Structure):
    """AutotpDense of csrc/dense_linear.cpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("numbers", ctypes.c_void_p),
    )


class DenseMatmul:
    """Multiplies `x` [tokens, cols] by weights [rows, cols] transposed: [tokens, rows of all].

    All are of one type, and the weights have as many columns, one beside the other. Each is packed,
    or a tensor in rows, which others may read too; that takes longer.

    Attributes:
        function, weights: the kernel and what it is given first, for C++ that calls by itself.
    """

    def __init__(self, library: ctypes.CDLL, *weights: Tensor | PackedWeight) -> None:
        self._multiply = library.autotp_dense_linear
        self._memory = [x.detach() if isinstance(x, Tensor) else x for x in weights]
        self._described = [_describe(weight) for weight in weights]
        self.rows = sum(weight.shape[0] for weight in weights)
        self.cols = weights[0].shape[1]
        self._dtype = DTYPES[weights[0].dtype]
        self.function = ctypes.cast(self._multiply, ctypes.c_void_p).value
        self.weights = (ctypes.c_void_p * len(weights))(
            *(ctypes.addressof(structure) for structure in self._described)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """See the class."""
        if x.stride(1) != 1:
            x = x.contiguous()
        out = x.new_empty(len(x), self.rows)
        failed = self._multiply(
            self.weights,
            len(self.weights),
            x.data_ptr(),
            x.stride(0),
            out.data_ptr(),
            len(x),
            self._dtype,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory to multiply {len(x)} tokens")
        return out


@functools.cache
def load_dense_library(isa: str | None = None) -> ctypes.CDLL | None:
    """The compiled kernel for the best instruction set here (or the named one).

    None, and a line in the log, where there is none.
    """
    try:
        flags = isa_flags(isa or best_isa())
        library = ctypes.CDLL(str(build_library("dense_linear", SOURCE, flags)))
    except (BuildError, OSError) as error:
        logger.warning("Dense weights are multiplied by torch, slowly for few tokens: %s", error)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.autotp_dense_linear.argtypes = (
        *(pointer, number, pointer, number, pointer),
        *(number, number, number),
    )
    library.autotp_dense_linear.restype = ctypes.c_int
    library.autotp_pack_dense.argtypes = (pointer, pointer, number)
    library.autotp_pack_dense.restype = None
    return library


def has_kernel(dtype: torch.dtype) -> bool:
    """Whether a type's products are better made here than by torch."""
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.bfloat16 and best_isa() != "amx"


def pack(library: ctypes.CDLL, weight: Tensor) -> PackedWeight:
    """Copy a weight [rows, cols] of 16 bits, whose columns lie side by side."""
    rows, cols = weight.shape
    padded = -(-rows // ROWS) * ROWS * (-(-cols // COLS) * COLS)
    numbers = huge_pages.zeros((padded,), weight.dtype)
    in_rows = _describe(weight.detach())
    library.autotp_pack_dense(
        ctypes.addressof(in_rows), numbers.data_ptr(), torch.get_num_threads()
    )
    return PackedWeight((rows, cols), numbers)


def _describe(weight: Tensor | PackedWeight) -> _Dense:
    """What C++ must know of a weight."""
    if isinstance(weight, PackedWeight):
        return _Dense(*weight.shape, 0, weight.numbers.data_ptr())
    return _Dense(*weight.shape, weight.stride(0), weight.data_ptr())

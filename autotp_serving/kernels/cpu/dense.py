"""Products with dense weights of 16 bits by csrc/dense_linear.cpp. Every rank on CPU.

float16: all of them, where torch's oneDNN has no instructions for it. bfloat16: a few tokens. With
many tokens torch's oneDNN is as fast as a core can be; with one it reads weights at half the
speed of memory. Both sum in the same order, which `sums_like_torch` makes sure of: so a token's
result does not depend on how many there are.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from autotp_serving.devices import huge_pages
from autotp_serving.devices.build import BuildError, best_isa, build_library, isa_flags

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "dense_linear.cpp"
DTYPES = {torch.bfloat16: 1, torch.float16: 2}
MOST_TOKENS = 64
MOST_TOKENS_BESIDE_AMX = 8  # whose tiles torch uses for more
LINE = 32  # numbers in a line of the cache
SET_DISTANCE = 2048  # numbers from a line to the next that shares its set of the first cache
NUM_CHECKED = 2**16  # results; of bfloat16 numbers summed in another order, 1 in 10,000 differs


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

    All are of one type, and the weights have as many columns, one beside the other.

    Attributes:
        most_tokens: up to which the kernel multiplies; torch takes more.
        function, weights: the kernel and what it is given first, for C++ that calls by itself.
    """

    def __init__(self, library: ctypes.CDLL, *weights: Tensor) -> None:
        self._multiply = library.autotp_dense_linear
        self._tensors = [weight.detach() for weight in weights]
        self._described = [
            _Dense(*weight.shape, weight.stride(0), weight.data_ptr()) for weight in self._tensors
        ]
        self.rows = sum(weight.shape[0] for weight in weights)
        self.cols = weights[0].shape[1]
        self._dtype = DTYPES[weights[0].dtype]
        self.most_tokens = MOST_TOKENS_BESIDE_AMX if best_isa() == "amx" else MOST_TOKENS
        if weights[0].dtype == torch.float16:
            self.most_tokens = sys.maxsize
        self.function = ctypes.cast(self._multiply, ctypes.c_void_p).value
        self.weights = (ctypes.c_void_p * len(weights))(
            *(ctypes.addressof(structure) for structure in self._described)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """See the class."""
        if len(x) > self.most_tokens:
            parts = [functional.linear(x, weight) for weight in self._tensors]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return self.multiply_few(x)

    def multiply_few(self, x: Tensor) -> Tensor:
        """The same by the kernel, whatever the number of tokens."""
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
    return library


def has_kernel(dtype: torch.dtype) -> bool:
    """Whether a type's products are better made here than by torch."""
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.bfloat16


def place(weight: Tensor) -> Tensor:
    """Copy a weight [rows, cols] to where it is read quickest: to huge pages, and, where rows are
    a multiple of 4 KiB long, a line further apart, or 16 of them would share a set of the cache.
    """
    rows, cols = weight.shape
    apart = cols + (LINE if cols % SET_DISTANCE == 0 else 0)
    return huge_pages.zeros((rows, apart), weight.dtype)[:, :cols].copy_(weight.detach())


def sums_like_torch(matmul: DenseMatmul) -> bool:
    """Whether the kernel's results are torch's to the last bit, by a look at some of them.

    Of a type that the kernel multiplies alone there is nothing to compare.
    """
    if matmul.most_tokens == sys.maxsize:
        return True
    num_tokens = max(matmul.most_tokens + 1, min(512, NUM_CHECKED // matmul.rows))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, matmul.cols, generator=generator).bfloat16()
    return torch.equal(matmul(x), matmul.multiply_few(x))

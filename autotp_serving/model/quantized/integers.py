"""Weights as whole numbers with a scale, and perhaps a zero, for groups of columns. Every rank.

GPTQ, AWQ, compressed-tensors and bitsandbytes differ in how they pack them; what they mean, and
what becomes of it here, is the same: `(code - zero) * scale`. With zero in the middle of the codes
that is sym_int4 or sym_int8, else asym_int4, whose smallest weight is -zero * scale in float16.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from autotp_serving.low_bit.formats import BLOCK, Format, LowBitError, num_blocks
from autotp_serving.low_bit.packing import pack
from autotp_serving.low_bit.tensor import LowBitTensor
from autotp_serving.model.quantized.weight import Range, Read, as_format, spread, touched

BITS = (4, 8)
"""Of the codes that are read."""


@dataclass(frozen=True)
class IntegerWeight(ABC):
    """What all layouts have in common; each reads its own tensors.

    Attributes:
        module: name of the layer.
        parts: see QuantizedWeight.
        bits: of a code.
        group: columns that share a scale; all of them, for a scale a row.
        is_symmetric: every zero is 2**(bits - 1).
        group_index: name of the tensor that says which group each column belongs to, where they do
            not follow one another; else None.
    """

    module: str
    shape: tuple[int, int]
    parts: tuple[str, ...]
    bits: int
    group: int
    is_symmetric: bool
    group_index: str | None = None

    @abstractmethod
    def read_codes(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """Codes from 0 to 2**bits - 1, uint8 [rows, cols]; columns fall on blocks or end it."""

    @abstractmethod
    def read_scales(self, read: Read, rows: Range, groups: Range) -> Tensor:
        """Scales in float32 [rows, groups]."""

    @abstractmethod
    def read_zeros(self, read: Read, rows: Range, groups: Range) -> Tensor | None:
        """Zeros, uint8 [rows, groups]; None where none are stored, and all are in the middle."""

    @abstractmethod
    def check_index(self, read: Read) -> None:
        """Look for stored sizes, or an order of the groups, that contradict what is known.

        Raises:
            LowBitError: it does.
        """

    @property
    def format(self) -> Format | None:
        """See QuantizedWeight."""
        fits = self.group % BLOCK == 0 or self.group >= self.shape[1]
        is_there = self.bits == 4 or self.is_symmetric
        return self.fallback if fits and is_there and self.group_index is None else None

    @property
    def fallback(self) -> Format:
        """See QuantizedWeight."""
        if self.bits == 8:
            return as_format("sym_int8")
        return as_format("sym_int4" if self.is_symmetric else "asym_int4")

    def repack(self, read: Read, rows: Range, cols: Range) -> LowBitTensor:
        """See QuantizedWeight."""
        self.check_index(read)
        groups = touched(cols, self.group)
        codes = self.read_codes(read, rows, cols)
        scales = self._check(self.read_scales(read, rows, groups))
        zeros = self._read_checked_zeros(read, rows, groups)
        shape = (rows[1] - rows[0], cols[1] - cols[0])
        blocks = num_blocks(shape[1])
        codes = functional.pad(codes, (0, blocks * BLOCK - shape[1]))
        planes = {"scales": spread(scales, self.group, cols)}
        if self.bits == 8:
            planes["codes"] = codes ^ 0x80  # from the middle: two's complement
        else:
            packed = pack(codes.view(-1, BLOCK), self.bits)["codes"]
            planes["codes"] = packed.view(shape[0], -1)
            planes["scales"] = self._check(planes["scales"].half())
        if not self.is_symmetric:
            mins = self._check((-zeros.float() * scales).half())
            planes["mins"] = spread(mins, self.group, cols)
        return LowBitTensor(self.fallback, shape, planes)

    def decode(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """See QuantizedWeight."""
        self.check_index(read)
        if self.group_index is None:
            groups = touched(cols, self.group)
            index = torch.arange(*cols) // self.group - groups[0]
        else:
            index = read(self.group_index, (cols,)).long()
            groups = (0, -(-self.shape[1] // self.group))
            if len(index) and not 0 <= index.min() <= index.max() < groups[1]:
                raise LowBitError(f"{self.group_index} names a group that there is not")
        scales = self._check(self.read_scales(read, rows, groups))
        zeros = self._read_checked_zeros(read, rows, groups)
        values = self.read_codes(read, rows, cols).float()
        if zeros is None:
            values -= 2 ** (self.bits - 1)
        else:
            values -= zeros.float().index_select(1, index)
        return values.mul_(scales.index_select(1, index))

    def _read_checked_zeros(self, read: Read, rows: Range, groups: Range) -> Tensor | None:
        zeros = self.read_zeros(read, rows, groups)
        if self.is_symmetric:
            if zeros is not None and not (zeros == 2 ** (self.bits - 1)).all():
                raise LowBitError(
                    f"{self.module} is said to be symmetric, and its zeros are not in the middle "
                    "of its codes: download the checkpoint again, or get another copy"
                )
            return None
        if zeros is None:
            raise LowBitError(f"{self.module} is said to be asymmetric, and has no zeros")
        return zeros

    def _check(self, scales: Tensor) -> Tensor:
        if not scales.isfinite().all():
            raise LowBitError(
                f"{self.module} has scales that are no numbers, or too large for float16"
            )
        return scales


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Codes of 4 or 8 bits out of int32 words, low bits first.

    Args:
        words: [..., num_words].

    Returns:
        uint8 [..., num_words * 32 / bits].
    """
    # A copy in any case: what counts as contiguous may still have strides that no view takes.
    data = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return data
    return torch.stack([data & 15, data >> 4], -1).flatten(-2)


def read_packed_rows(read: Read, name: str, rows: Range, others: Range, bits: int) -> Tensor:
    """Codes of a tensor [others, rows in words]: uint8 [others, rows], at any rows."""
    per_word = 32 // bits
    first, last = rows[0] // per_word, -(-rows[1] // per_word)
    codes = unpack_words(read(name, (others, (first, last))), bits)
    return codes[:, rows[0] - first * per_word : rows[1] - first * per_word]

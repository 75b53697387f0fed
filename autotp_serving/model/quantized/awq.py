"""Weights as AWQ stores them, in the order of its gemm kernel. Every rank.

qweight  int32 [cols, rows / 8], eight rows to a word in an order of their own
qzeros   int32 [groups, rows / 8], packed alike
scales   float [groups, rows]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autotp_serving.model.quantized.integers import IntegerWeight, unpack_words
from autotp_serving.model.quantized.settings import Quantization
from autotp_serving.model.quantized.weight import QuantizedWeight, Range, Read
from autotp_serving.model.stored_tensors import StoredTensor

PER_WORD = 8

# Where in a word the code of each of its eight rows lies, in nibbles from the low end: the packer
# takes rows 0, 2, 4, 6, 1, 3, 5, 7.
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class AwqWeight(IntegerWeight):
    """A layer's qweight, qzeros and scales."""

    def read_codes(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """See IntegerWeight."""
        return self._read_words(read, "qweight", rows, cols)

    def read_scales(self, read: Read, rows: Range, groups: Range) -> Tensor:
        """See IntegerWeight."""
        return read(f"{self.module}.scales", (groups, rows)).float().t()

    def read_zeros(self, read: Read, rows: Range, groups: Range) -> Tensor | None:
        """See IntegerWeight."""
        if f"{self.module}.qzeros" not in self.parts:
            return None
        return self._read_words(read, "qzeros", rows, groups)

    def check_index(self, read: Read) -> None:
        """Nothing of the kind is stored."""

    def _read_words(self, read: Read, part: str, rows: Range, others: Range) -> Tensor:
        """Codes uint8 [rows, others]."""
        first, last = rows[0] // PER_WORD, -(-rows[1] // PER_WORD)
        words = read(f"{self.module}.{part}", (others, (first, last)))
        nibbles = unpack_words(words.t().contiguous(), 4).view(last - first, -1, PER_WORD)
        codes = nibbles[:, :, torch.tensor(NIBBLES)].transpose(1, 2).reshape(-1, words.shape[0])
        return codes[rows[0] - first * PER_WORD : rows[1] - first * PER_WORD]


def find_awq_weights(
    quantization: Quantization, stored: dict[str, StoredTensor], read: Read
) -> dict[str, QuantizedWeight]:
    """All layers that have a qweight.

    Raises:
        ConfigError: settings or shapes that are not read here.
    """
    settings = quantization.settings
    bits = settings.get("bits", settings.get("w_bit", 4))
    named = (settings.get(key) for key in ("version", "checkpoint_format", "format"))
    version = str(next(filter(None, named), "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise quantization.refuse(
            f"AWQ with {bits!r:.20} bits in the order of {version!r:.20} is not read here, only 4 "
            "bits in that of 'gemm'"
        )
    size = settings.get("group_size", settings.get("q_group_size", 128))
    found: dict[str, QuantizedWeight] = {}
    for name, tensor in stored.items():
        module, _, last = name.rpartition(".")
        if last != "qweight":
            continue
        parts = [f"{module}.{part}" for part in ("qweight", "scales", "qzeros")]
        if parts[2] not in stored and not settings.get("zero_point", True):
            parts.pop()
        missing = [part for part in parts if part not in stored or len(stored[part].shape) != 2]
        if missing or tensor.dtype != "I32":
            raise quantization.refuse(f"{(*missing, name)[0]} is missing, or no tensor of AWQ")
        cols, rows = tensor.shape[0], tensor.shape[1] * PER_WORD
        group = cols if size in (-1, None) else size
        groups = -(-cols // group) if type(group) is int and group > 0 else 0
        expected = {1: (groups, rows), 2: (groups, rows // PER_WORD)}
        if any(stored[part].shape != expected[at] for at, part in enumerate(parts) if at):
            raise quantization.refuse(
                f"{module} has scales of {list(stored[parts[1]].shape)} for a weight of "
                f"{[rows, cols]}, which do not fit its group_size of {size!r:.20}"
            )
        found[f"{module}.weight"] = AwqWeight(
            module, (rows, cols), tuple(parts), 4, group, is_symmetric=len(parts) == 2
        )
    return found

"""Weights as GPTQ stores them, and AutoRound in GPTQ's or its own name. Every rank.

    qweight  int32 [cols * bits / 32, rows], codes along the columns, low bits first
    qzeros   int32 [groups, rows * bits / 32]; the first version of the layout stores zero - 1
    scales   float [groups, rows]
    g_idx    int32 [cols], the group of each column; those of desc_act do not follow one another

What a layer's tensors have for sizes tells its bits and groups, also where they differ by layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotp_serving.low_bit.formats import LowBitError
from autotp_serving.model.quantized.integers import (
    BITS,
    IntegerWeight,
    read_packed_rows,
    unpack_words,
)
from autotp_serving.model.quantized.settings import Quantization
from autotp_serving.model.quantized.weight import QuantizedWeight, Range, Read
from autotp_serving.model.stored_tensors import StoredTensor

# By what is added to a stored zero: 1, or nothing.
LAYOUTS_V1 = ("gptq", "auto_round:auto_gptq")
LAYOUTS_V2 = ("gptq_v2", "auto_round", "auto_round:gptqmodel")


@dataclass(frozen=True)
class GptqWeight(IntegerWeight):
    """A layer's qweight, qzeros and scales.

    Attributes:
        zero_offset: what is added to a stored zero.
        has_index: g_idx is stored.
    """

    zero_offset: int = 1
    has_index: bool = False

    def read_codes(self, read: Read, rows: Range, cols: Range) -> Tensor:
        """See IntegerWeight."""
        per_word = 32 // self.bits
        words = (cols[0] // per_word, -(-cols[1] // per_word))
        data = read(f"{self.module}.qweight", (words, rows))
        codes = unpack_words(data.t(), self.bits)
        return codes[:, : cols[1] - cols[0]]

    def read_scales(self, read: Read, rows: Range, groups: Range) -> Tensor:
        """See IntegerWeight."""
        return read(f"{self.module}.scales", (groups, rows)).float().t()

    def read_zeros(self, read: Read, rows: Range, groups: Range) -> Tensor:
        """See IntegerWeight."""
        stored = read_packed_rows(read, f"{self.module}.qzeros", rows, groups, self.bits)
        return ((stored.int() + self.zero_offset) & (2**self.bits - 1)).to(torch.uint8).t()

    def check_index(self, read: Read) -> None:
        """See IntegerWeight."""
        if not self.has_index or self.group_index is not None:
            return
        index = read(f"{self.module}.g_idx", ((0, self.shape[1]),)).long()
        if not torch.equal(index, torch.arange(self.shape[1]) // self.group):
            raise LowBitError(
                f"{self.module}.g_idx puts columns into other groups than config.json says "
                "(desc_act is false): get the checkpoint's own config.json"
            )


def find_gptq_weights(
    quantization: Quantization, stored: dict[str, StoredTensor], read: Read
) -> dict[str, QuantizedWeight]:
    """All layers that have a qweight.

    Raises:
        ConfigError: settings or shapes that are not read here.
    """
    settings = quantization.settings
    default = "gptq" if quantization.method == "gptq" else None
    version = settings.get("checkpoint_format") or settings.get("packing_format") or default
    if version not in (*LAYOUTS_V1, *LAYOUTS_V2):
        raise quantization.refuse(f"the layout {version!r:.60} of GPTQ is not read here")
    offset = 1 if version in LAYOUTS_V1 else 0
    groups = _list_values(settings, "group_size", 128)
    symmetries = _list_values(settings, "sym", True)
    is_permuted = any(_list_values(settings, "desc_act", False))
    found: dict[str, QuantizedWeight] = {}
    for name in stored:
        module, _, last = name.rpartition(".")
        if last != "qweight":
            continue
        bits, cols = _find_bits(quantization, module, stored)
        rows = stored[name].shape[1]
        group = _find_group(quantization, module, stored, cols, groups)
        index = f"{module}.g_idx"
        parts = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
        found[f"{module}.weight"] = GptqWeight(
            module=module,
            shape=(rows, cols),
            parts=(*parts, index) if index in stored else tuple(parts),
            bits=bits,
            group=group,
            is_symmetric=all(symmetries),
            group_index=index if is_permuted and group < cols and index in stored else None,
            zero_offset=offset,
            has_index=index in stored,
        )
    return found


def _list_values(settings: dict[str, Any], name: str, default: Any) -> list[Any]:
    """A setting, and what it is for single layers."""
    overrides: Iterable[Any] = ()
    for key in ("dynamic", "extra_config"):
        found = settings.get(key)
        if isinstance(found, dict):
            overrides = [*overrides, *found.values()]
    return [
        settings.get(name, default),
        *(one[name] for one in overrides if isinstance(one, dict) and name in one),
    ]


def _find_bits(
    quantization: Quantization, module: str, stored: dict[str, StoredTensor]
) -> tuple[int, int]:
    """Bits of a code, and columns of the weight."""
    shapes = _find_shapes(quantization, module, stored)
    words, rows = shapes["qweight"]
    index = stored.get(f"{module}.g_idx")
    named = [one for one in _list_values(quantization.settings, "bits", 4) if one in BITS]
    for bits in (*named, *BITS):
        cols = words * 32 // bits
        fits_zeros = shapes["qzeros"][1] * 32 == rows * bits
        fits_index = index is None or index.shape == (cols,)
        if fits_zeros and fits_index:
            return bits, cols
    raise quantization.refuse(
        f"{module} has a qweight of {list(shapes['qweight'])} and qzeros of "
        f"{list(shapes['qzeros'])}, which are no codes of 4 or 8 bits"
    )


def _find_group(
    quantization: Quantization,
    module: str,
    stored: dict[str, StoredTensor],
    cols: int,
    groups: list[Any],
) -> int:
    """Columns of a group."""
    num_groups, num_rows = stored[f"{module}.scales"].shape
    zeros, rows = stored[f"{module}.qzeros"].shape[0], stored[f"{module}.qweight"].shape[1]
    for size in groups:
        group = cols if size in (-1, None) else size
        is_size = type(group) is int and group > 0
        if is_size and num_rows == rows and num_groups == zeros == -(-cols // group):
            return group
    raise quantization.refuse(
        f"{module} has scales of {list(stored[f'{module}.scales'].shape)} for a weight of "
        f"{[rows, cols]}, which fit no group_size of {groups!r:.60}"
    )


def _find_shapes(
    quantization: Quantization, module: str, stored: dict[str, StoredTensor]
) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for part in ("qweight", "qzeros", "scales"):
        tensor = stored.get(f"{module}.{part}")
        if tensor is None or len(tensor.shape) != 2:
            raise quantization.refuse(f"{module} has a qweight, and no {part} of two dimensions")
        if part != "scales" and tensor.dtype != "I32":
            raise quantization.refuse(f"{module}.{part} is stored as {tensor.dtype}, not I32")
        shapes[part] = tensor.shape
    return shapes

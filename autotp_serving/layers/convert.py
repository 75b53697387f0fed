"""Conversion of a model's linear layers, one at a time. Every rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from autotp_serving.layers.low_bit_linear import LowBitLinear
from autotp_serving.low_bit.formats import BLOCK, LowBitError
from autotp_serving.low_bit.selection import ROW_PARALLEL
from autotp_serving.low_bit.tensor import LowBitTensor


def check_columns(cols: tuple[int, int], full_cols: int) -> None:
    """Refuse a slice that splits a block: its bytes would then depend on the number of ranks.

    Args:
        cols: (start, stop) of a rank's slice in the whole weight's columns.
        full_cols: columns of the whole weight.

    Raises:
        LowBitError: with the sizes.
    """
    start, stop = cols
    if start % BLOCK or (stop % BLOCK and stop != full_cols):
        raise LowBitError(
            f"this number of ranks splits its {full_cols} columns at {start} and {stop}, inside a "
            f"block of {BLOCK}: use another number of ranks, or --low-bit bf16"
        )


def replace_linear(
    module: nn.Module, weight: LowBitTensor, all_reduce: Callable[[torch.Tensor], torch.Tensor]
) -> LowBitLinear:
    """Make the low-bit layer that takes a dense one's place.

    Args:
        module: a linear layer, split by rows or columns or not at all.
        weight: [rows, cols] this rank's slice.
    """
    # AutoTP's layers without a group leave their all-reduce to the layer around them.
    reduces = type(module).__name__ in ROW_PARALLEL and module.mp_group is not None
    reduce = all_reduce if reduces else None
    return LowBitLinear(weight, module.bias, reduce)

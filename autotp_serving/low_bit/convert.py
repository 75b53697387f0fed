"""Which layers of a model become low-bit, and their conversion, one at a time. Every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .formats import BLOCK, Format, LowBitError, find_format
from .linear import LowBitLinear
from .tensor import LowBitTensor

AUTO_HEAD = "auto"
HEAD_FORMAT = "sym_int8"

# DeepSpeed AutoTP's layers are known by name: importing DeepSpeed takes seconds, and a single
# rank does without it.
COLUMN_PARALLEL = ("Linear", "LinearLayer", "fused_LinearLayer")
ROW_PARALLEL = ("LinearAllreduce",)

# A router's few weights decide alone which experts a token sees; transformers 5 has them in no
# linear layer at all.
ROUTERS = (".mlp.gate", ".block_sparse_moe.gate")


@dataclass(frozen=True)
class LowBitPlan:
    """The formats asked for.

    Attributes:
        linears: of the linear layers; None leaves them dense.
        head: of the output head; None leaves it dense.
        keep_dense: parts of module names that stay dense.
    """

    linears: Format | None
    head: Format | None
    keep_dense: tuple[str, ...] = ()

    @staticmethod
    def from_names(low_bit: str, head: str, keep_dense: tuple[str, ...]) -> LowBitPlan:
        """Look the names up; head "auto" is sym_int8 beside low-bit linears, else dense.

        The head decides each token alone, with no later layer to even its errors out.

        Raises:
            LowBitError: an unknown name.
        """
        linears = find_format(low_bit)
        if head == AUTO_HEAD:
            return LowBitPlan(linears, find_format(HEAD_FORMAT) if linears else None, keep_dense)
        return LowBitPlan(linears, find_format(head), keep_dense)

    def converts(self, name: str, module: nn.Module) -> bool:
        """True for a linear layer that is to become low-bit."""
        return (
            self.linears is not None
            and type(module).__name__ in (*COLUMN_PARALLEL, *ROW_PARALLEL)
            and not name.endswith(ROUTERS)
            and not any(part in name for part in self.keep_dense)
        )


def check_columns(cols: tuple[int, int], full_cols: int) -> None:
    """Refuse a slice that cuts a block: its bytes would then depend on the number of ranks.

    Args:
        cols: (start, stop) of a rank's slice in the whole weight's columns.
        full_cols: columns of the whole weight.

    Raises:
        LowBitError: with the sizes.
    """
    start, stop = cols
    if start % BLOCK or (stop % BLOCK and stop != full_cols):
        raise LowBitError(
            f"this number of ranks cuts its {full_cols} columns at {start} and {stop}, inside a "
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
    # AutoTP's layers without a group leave their sum to the layer around them.
    reduces = type(module).__name__ in ROW_PARALLEL and module.mp_group is not None
    reduce = all_reduce if reduces else None
    return LowBitLinear(weight, module.bias, reduce)

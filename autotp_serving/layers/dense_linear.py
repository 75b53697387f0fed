"""Linear layers whose weight stays dense, once it is loaded. Every rank.

They take the place of AutoTP's, so that dense and low-bit layers multiply and sum in the same way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from autotp_serving.heap import return_free_memory
from autotp_serving.kernels.cpu.dense import (
    COLS,
    ROWS,
    DenseMatmul,
    PackedWeight,
    has_kernel,
    load_dense_library,
    pack,
)
from autotp_serving.layers.adapters import Adapt
from autotp_serving.layers.head import VocabParallelHead
from autotp_serving.low_bit.selection import COLUMN_PARALLEL, ROW_PARALLEL

AllReduce = Callable[[Tensor], Tensor]

TRIM_BYTES = 2**28
"""So much of a model at most lies twice in memory while it is copied."""


class DenseLinear(nn.Module):
    """`reduce(x @ weight.T) + bias` with a dense weight.

    Args:
        weight: [out_features, in_features], this rank's; packed for `matmul`, if it is given.
        bias: [out_features] or None; with `reduce` it is whole on every rank.
        reduce: sums a product over the ranks in place, or None.
        matmul: multiplies [tokens, in_features] by the weight, or None for torch.

    Attributes:
        adapt: adds to the product, before the sum over the ranks, what adapters make of the input.
    """

    def __init__(
        self,
        weight: nn.Parameter | PackedWeight,
        bias: nn.Parameter | None,
        reduce: AllReduce | None,
        matmul: DenseMatmul | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        if isinstance(weight, PackedWeight):
            self.register_buffer("packed", weight.numbers)
        self.bias = bias
        self.reduce = reduce
        self.adapt: Adapt | None = None
        self.matmul = matmul

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features], equal on all ranks if it reduces."""
        if self.matmul is None:
            out = functional.linear(x, self.weight)
        else:
            out = self.matmul(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)
        if self.adapt is not None:
            self.adapt(x, out)
        return self.finish(out)

    def finish(self, out: Tensor) -> Tensor:
        """All-reduce the product and add the bias, both in place, where there are any."""
        if self.reduce is not None:
            out = self.reduce(out)
        return out if self.bias is None else out.add_(self.bias)


class PackedEmbedding(nn.Module):
    """An embedding that shares its memory with the output head, packed as the head reads it.

    Args:
        weight: [vocab_size, hidden_size].
    """

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("packed", weight.numbers)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Map int64 [...] to [..., hidden_size]."""
        num_pairs = -(-self.weight.shape[1] // COLS) * COLS // 2
        pairs = self.packed.view(torch.int32).view(-1, num_pairs, ROWS)
        found = pairs[token_ids // ROWS, :, token_ids % ROWS].view(self.weight.dtype)
        return found[..., : self.weight.shape[1]]


def take_over(weight: Tensor) -> tuple[Tensor | PackedWeight, DenseMatmul | None]:
    """A weight [rows, cols], packed, and its product; as it is, and None, for torch to multiply."""
    library = _find_library(weight)
    if library is None:
        return weight, None
    packed = pack(library, weight)
    return packed, DenseMatmul(library, packed)


def _find_library(weight: Tensor) -> ctypes.CDLL | None:
    """The kernel, or None where torch is to multiply by the weight."""
    if not weight.is_cpu or not has_kernel(weight.dtype) or weight.stride(1) != 1:
        return None
    return load_dense_library() if weight.numel() else None


def _take_over_head(model: nn.Module, head: VocabParallelHead) -> None:
    """Pack a dense head, or the embedding that it is tied to. An embedding that does more than to
    look up stays in rows, and so does one that is cut elsewhere than between groups of rows.
    """
    library = None if head.low_bit is not None else _find_library(head.weight)
    if library is None:
        return
    weight: Tensor | PackedWeight = head.weight
    embedding = model.get_input_embeddings() if head.is_tied else None
    if embedding is None:
        weight = pack(library, head.weight)
        head.register_buffer("packed", weight.numbers)
    elif type(embedding) is nn.Embedding and head.start % ROWS == 0:
        whole = pack(library, embedding.weight)
        weight = whole.select_rows(head.start, head.stop)
        (name,) = (name for name, module in model.named_modules() if module is embedding)
        model.set_submodule(name, PackedEmbedding(whole))
    if isinstance(weight, PackedWeight):
        head.drop_weight()
    head.matmul = DenseMatmul(library, weight)


def join_dense(linears: Sequence[nn.Module]) -> DenseMatmul | None:
    """One product of layers that share their input, or None where a kernel does not multiply all.

    All of them have a bias, or none.
    """
    for linear in linears:
        if not isinstance(linear, DenseLinear) or linear.matmul is None or linear.reduce:
            return None
    if len({linear.bias is None for linear in linears}) != 1:
        return None
    return DenseMatmul(load_dense_library(), *(linear.weight for linear in linears))


@torch.no_grad()
def take_over_linears(model: nn.Module, all_reduce: AllReduce) -> None:
    """Replace AutoTP's layers that sum, and all dense ones that a kernel multiplies.

    Once the weights are loaded; those that a kernel reads are packed, one at a time. What they were
    packed from is returned on the way, or a rank would hold two models.
    """
    num_copied = 0
    for name in [name for name, _ in model.named_modules()]:  # no module is kept alive by a list
        module = model.get_submodule(name)
        kind = type(module).__name__
        if isinstance(module, VocabParallelHead):
            _take_over_head(model, module)
        elif kind in COLUMN_PARALLEL + ROW_PARALLEL and not getattr(module, "gather_output", False):
            weight, matmul = take_over(module.weight)
            reduces = kind in ROW_PARALLEL and module.mp_group is not None
            if matmul is not None or reduces:
                reduce = all_reduce if reduces else None
                if matmul is not None:
                    num_copied += module.weight.nbytes
                model.set_submodule(name, DenseLinear(weight, module.bias, reduce, matmul))
        if num_copied > TRIM_BYTES:
            del module
            return_free_memory()
            num_copied = 0
    return_free_memory()

"""The output head, split over the vocabulary, or what stands in its place. Every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class ConvertedWeight:
    """In the place of a weight: some families give their head its weight's type."""

    dtype: torch.dtype


class VocabParallelHead(nn.Module):
    """Computes this rank's slice of the logits.

    AutoTP would split the input instead, and so round each logit once per rank. Split over the
    vocabulary, logits are those of one rank, and a tied head is a view of the whole embedding
    that every rank holds anyway.

    Attributes:
        weight: [rows of this rank, hidden_size]; once `low_bit` or a packed weight has taken its
            place, what is left.
        low_bit: a layer without bias that multiplies by the converted weight.
        matmul: multiplies [num_tokens, hidden_size] by the dense weight, or None for torch.
        is_tied: whether the weight is a view of the embedding.
        gathers: whether `forward` hands every rank all logits, which is right for any family.
            Where it does not, what comes after it must treat all logits alike, and
            `LogitsGatherer` hands on what sampling needs.
        all_reduce: sums a tensor over the ranks, in place.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        has_bias: bool,
        dtype: torch.dtype,
        rank: int,
        num_ranks: int,
        all_reduce: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.start = vocab_size * rank // num_ranks
        self.stop = vocab_size * (rank + 1) // num_ranks
        self.gathers = True
        self.is_tied = False
        self.all_reduce = all_reduce
        num_rows = self.stop - self.start
        self.weight = nn.Parameter(
            torch.empty((num_rows, hidden_size), dtype=dtype, device="meta"), requires_grad=False
        )
        self.low_bit: nn.Module | None = None
        self.matmul: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.bias = None
        if has_bias:
            self.bias = nn.Parameter(
                torch.empty(num_rows, dtype=dtype, device="meta"), requires_grad=False
            )

    def tie_to(self, embedding: torch.Tensor) -> None:
        """Share the memory of the embedding, [vocab_size, hidden_size]."""
        self.is_tied = True
        self.weight = nn.Parameter(embedding[self.start : self.stop], requires_grad=False)

    def set_low_bit(self, linear: nn.Module) -> None:
        """Let a converted weight, of this rank's rows, take the dense one's place."""
        self.low_bit = linear
        self.drop_weight()

    def drop_weight(self) -> None:
        """Another form has taken the dense weight's place."""
        dtype = self.weight.dtype
        del self.weight
        self.weight = ConvertedWeight(dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map [..., hidden_size] to [..., vocab_size], equal on all ranks.

        Where it does not gather: to [..., stop - start], this rank's.
        """
        if self.low_bit is None and self.matmul is None:
            logits = functional.linear(hidden, self.weight, self.bias)
        else:
            multiply = self.low_bit or self.matmul
            logits = multiply(hidden.reshape(-1, hidden.shape[-1]))
            logits = logits.view(*hidden.shape[:-1], logits.shape[-1])
            if self.bias is not None:
                logits = logits + self.bias
        return self.gather(logits) if self.gathers else logits

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """This rank's slice of the logits, [..., its rows], to all of them on every rank."""
        if self.num_ranks == 1:
            return logits
        # An all-reduce with zeros elsewhere is a gather that works for uneven slices on every
        # backend.
        full = logits.new_zeros((*logits.shape[:-1], self.vocab_size))
        full[..., self.start : self.stop] = logits
        return self.all_reduce(full)


class PoolingHead(nn.Module):
    """Stands for the output head in models that are pooled: hands hidden states on as they are, or
    gives their logits by a classifier, of which every rank has the whole.

    Attributes:
        weight: [num_labels, hidden_size], or None without a classifier, and before
            `label_tokens` are taken from the output head.
        label_tokens: tokens whose rows of the output head are the classifier.
        vocab_size: tokens that the model has an embedding for.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        dtype: torch.dtype,
        num_labels: int,
        label_tokens: tuple[int, ...],
        rank: int,
        num_ranks: int,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.label_tokens = label_tokens
        self.gathers = True
        self.bias = None
        self.weight = None
        if num_labels:
            self.weight = nn.Parameter(
                torch.empty((num_labels, hidden_size), dtype=dtype, device="meta"),
                requires_grad=False,
            )

    @property
    def num_labels(self) -> int:
        """Logits of one row; 0 where hidden states are handed on."""
        return len(self.label_tokens) if self.weight is None else len(self.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map [..., hidden_size] to itself, or to [..., num_labels]."""
        return hidden if self.weight is None else functional.linear(hidden, self.weight)

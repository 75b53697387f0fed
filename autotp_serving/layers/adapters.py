"""LoRA adapters beside linear layers: a product of two thin matrices for some of the tokens.

Every rank. A column-parallel layer has the rows of B that are its own rows and all of A. A
row-parallel one has the columns of A that are its own columns and all of B: what it adds goes into
the partial product, and the layer's own all-reduce sums it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from torch import Tensor, nn
from torch.nn import functional

Adapt = Callable[[Tensor, Tensor], None]
"""Adds in place, to a layer's product [..., out_features], what adapters make of its input."""


class AdapterStep:
    """Who runs with which adapter in the step under way.

    Attributes:
        spans: of each sequence with an adapter its first token, the token after its last, and the
            slot of its adapter, from 1 on.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[int, int, int]] = []

    def begin(self, slots: Sequence[int], query_lens: Sequence[int]) -> None:
        """Take in a step's sequences.

        Args:
            slots: [num_seqs], 0 for none.
            query_lens: [num_seqs], tokens that each runs.
        """
        ends = list(accumulate(query_lens))
        self.spans = [
            (end - length, end, slot)
            for end, length, slot in zip(ends, query_lens, slots, strict=True)
            if slot
        ]

    def end(self) -> None:
        """Nobody runs."""
        self.spans = []


class LinearAdapters:
    """The adapters of one linear layer in portable torch and float32, for each sequence by itself:
    what a sequence gets does not depend on others.
    """

    def __init__(self, linear: nn.Module, step: AdapterStep) -> None:
        self._linear, self._step = linear, step
        self._of_slot: dict[int, tuple[Tensor, Tensor, float]] = {}
        self._hook: list[Callable[[], None]] = []

    def put(self, slot: int, down: Tensor, up: Tensor, scale: float) -> None:
        """Take in this rank's part of an adapter.

        Args:
            slot: from 1.
            down: [rank, in_features of this rank].
            up: [out_features of this rank, rank].
        """
        self._of_slot[slot] = down.float(), up.float(), scale
        if not self._hook:
            self._hook.append(attach(self._linear, self._add))

    def drop(self, slot: int) -> None:
        """Forget it; nothing where there is none."""
        self._of_slot.pop(slot, None)
        if self._hook and not self._of_slot:
            self._hook.pop()()

    def _add(self, x: Tensor, out: Tensor) -> None:
        x, out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        for start, stop, slot in self._step.spans:
            if slot in self._of_slot:
                down, up, scale = self._of_slot[slot]
                low_rank = functional.linear(x[start:stop].float(), down)
                more = functional.linear(low_rank, up).mul_(scale)
                out[start:stop] += more.to(out.dtype)


def attach(linear: nn.Module, adapt: Adapt) -> Callable[[], None]:
    """Have a layer adapted from now on; what this returns ends it."""
    if hasattr(linear, "adapt"):  # before it sums over the ranks
        linear.adapt = adapt

        def detach() -> None:
            linear.adapt = None

        return detach
    # Of torch or AutoTP, which then sums nothing.
    hook = linear.register_forward_hook(lambda _, inputs, out: adapt(inputs[0], out))
    return hook.remove

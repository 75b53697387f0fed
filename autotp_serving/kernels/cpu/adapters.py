"""LoRA adapters beside a product, by csrc/adapters.h. Every rank on CPU, in bfloat16."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from autotp_serving.devices import huge_pages
from autotp_serving.kernels.cpu.layer_ops import LayerOps

TILE = 16
LINE = 32
"""Numbers of bfloat16 in a line of the cache."""


class _Part(ctypes.Structure):
    """AutotpAdapterPart of csrc/adapters.h."""

    _fields_ = (
        ("down", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


class _Runs(ctypes.Structure):
    """AutotpAdapterRuns of csrc/adapters.h."""

    _fields_ = (
        ("runs", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("low_rank", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
    )


class AdapterRuns:
    """Which tokens of a step have an adapter.

    Args:
        spans: first token, token after the last, and slot (from 1) of each sequence that has one.
        max_rank: of all parts of a product together.
    """

    def __init__(self, spans: Sequence[tuple[int, int, int]], max_rank: int) -> None:
        merged: list[list[int]] = []
        for start, stop, slot in spans:
            last = merged[-1] if merged else None
            if last is not None and last[0] + last[1] == start and last[2] == slot - 1:
                last[1] += stop - start
            else:
                merged.append([start, stop - start, slot - 1])
        self._runs = torch.tensor(merged)
        self._low_rank = torch.empty(spans[-1][1] * max_rank)
        self._described = _Runs(
            self._runs.data_ptr(), len(merged), self._low_rank.data_ptr(), max_rank
        )
        self.address = ctypes.addressof(self._described)


class SlotMemory:
    """Adapters' matrices: those of a slot one behind the other, as a step reads them.

    A slot's memory stays its own for as long as the server runs; one never used takes none.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._num_numbers = 0
        self._of_slot: dict[int, Tensor] = {}

    def reserve(self, num_numbers: int) -> int:
        """Room for so many numbers in every slot; where it begins."""
        start = self._num_numbers
        self._num_numbers += round_to_line(num_numbers)
        return start

    def find(self, slot: int) -> Tensor:
        """All of a slot's numbers, bfloat16; after the last `reserve`."""
        if slot not in self._of_slot:
            self._of_slot[slot] = huge_pages.zeros((self._num_numbers,), torch.bfloat16)
        return self._of_slot[slot]


def round_to_line(num_numbers: int) -> int:
    return -(-num_numbers // LINE) * LINE


class CpuAdapters:
    """What adapters add to one product of a layer, or to several layers' joined products.

    Args:
        cols: of the product's input, a multiple of 16.
        widths: rows of each of the layers that it joins, multiples of 16.
        memory: where matrices go.
        max_rank: of an adapter.
    """

    def __init__(
        self, ops: LayerOps, cols: int, widths: Sequence[int], memory: SlotMemory, max_rank: int
    ) -> None:
        self._add = ops.add_adapters
        self._cols, self._widths = cols, tuple(widths)
        self._first_rows = list(accumulate(widths, initial=0))
        self.num_parts = len(self._widths)
        self._parts = (_Part * (memory.num_slots * self.num_parts))()
        self._memory = memory
        numbers_per_rank = self.num_parts * cols + self._first_rows[-1]
        self._start = memory.reserve((max_rank + 1) * numbers_per_rank)
        self._held: set[int] = set()
        self.address = ctypes.addressof(self._parts)

    def put(self, slot: int, part: int, down: Tensor, up: Tensor, scale: float) -> None:
        """Take in an adapter's matrices for one of the layers.

        Args:
            slot: from 1.
            down: [rank, cols], the rank that of the slot's other parts.
            up: [rows, rank].
        """
        rank, width = len(down), self._widths[part]
        pairs = functional.pad(up, (0, rank % 2)).view(width // TILE, TILE, -1, 2)
        own = self._memory.find(slot)[self._start :]
        ups = round_to_line(self.num_parts * rank * self._cols)
        kept_down = own[part * rank * self._cols :][: down.numel()]
        kept_up = own[ups + self._first_rows[part] * (rank + rank % 2) :][: pairs.numel()]
        kept_down.view(down.shape).copy_(down)
        pairs = pairs.transpose(1, 2)
        kept_up.view(pairs.shape).copy_(pairs)
        index = (slot - 1) * self.num_parts + part
        self._held.add(index)
        self._parts[index] = _Part(
            kept_down.data_ptr(), kept_up.data_ptr(), rank, self._first_rows[part], width, scale
        )

    def drop(self, slot: int, part: int) -> None:
        """Forget them; nothing where there are none."""
        index = (slot - 1) * self.num_parts + part
        self._parts[index] = _Part()
        self._held.discard(index)

    @property
    def is_empty(self) -> bool:
        """Whether no adapter adds to this product."""
        return not self._held

    def add(self, x: Tensor, out: Tensor, runs: AdapterRuns) -> None:
        """Add to `out` [num_tokens, rows] what the adapters make of `x` [num_tokens, cols]."""
        x = x.contiguous()
        self._add(
            self.address,
            self.num_parts,
            runs.address,
            x.data_ptr(),
            self._cols,
            out.data_ptr(),
            out.shape[-1],
            torch.get_num_threads(),
        )

"""LoRA adapters beside a product, by csrc/adapters.h. Every rank on CPU, in bfloat16."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from autotp_serving.kernels.cpu.layer_ops import LayerOps

TILE = 16


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


class CpuAdapters:
    """What adapters add to one product of a layer, or to several layers' joined products.

    Args:
        cols: of the product's input, a multiple of 16.
        widths: rows of each of the layers that it joins, multiples of 16.
    """

    def __init__(self, ops: LayerOps, cols: int, widths: Sequence[int], num_slots: int) -> None:
        self._add = ops.add_adapters
        self._cols, self._widths = cols, tuple(widths)
        self._first_rows = list(accumulate(widths, initial=0))
        self.num_parts = len(self._widths)
        self._parts = (_Part * (num_slots * self.num_parts))()
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.address = ctypes.addressof(self._parts)

    def put(self, slot: int, part: int, down: Tensor, up: Tensor, scale: float) -> None:
        """Take in an adapter's matrices for one of the layers.

        Args:
            slot: from 1.
            down: [rank, cols].
            up: [rows, rank].
        """
        rank, width = len(down), self._widths[part]
        down = down.to(torch.bfloat16).contiguous()
        up = up.to(torch.bfloat16).view(width // TILE, TILE, rank).transpose(1, 2).contiguous()
        index = (slot - 1) * self.num_parts + part
        self._kept[index] = down, up
        self._parts[index] = _Part(
            down.data_ptr(), up.data_ptr(), rank, self._first_rows[part], width, scale
        )

    def drop(self, slot: int, part: int) -> None:
        """Forget them; nothing where there are none."""
        index = (slot - 1) * self.num_parts + part
        self._parts[index] = _Part()
        self._kept.pop(index, None)

    @property
    def is_empty(self) -> bool:
        """Whether no adapter adds to this product."""
        return not self._kept

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

"""Tiles, warps and paths for each card: the one place that knows them. No device is needed here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

HOPPER = "hopper"
CUDA = "cuda"
ARC = "arc"
"""Arc A-series (`acm-g10`): 128 registers of 32 bytes a thread, no matrix unit in Triton 3.3."""
XE = "xe"
"""Data Center Max (`pvc`), and what is not known better."""


@dataclass(frozen=True)
class DecodeTiles:
    """How single tokens attend.

    Attributes:
        tile: positions at a time.
        min_split, max_splits: positions in a split at least, a multiple of tile; splits of a
            context at most, a power of two.
        use_dot: a program takes all heads of a kv head by matrix products, else one head by sums.
        merges: the last split to arrive merges them, else a second kernel.
        options: for Triton's compiler.
    """

    tile: int
    warps: int
    stages: int
    min_split: int
    max_splits: int
    use_dot: bool
    merges: bool
    merge_warps: int = 4
    options: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class PrefillTiles:
    """How prompts attend: queries and keys at a time."""

    queries: int
    keys: int
    warps: int
    stages: int
    options: tuple[tuple[str, object], ...] = ()


def find_card(device: torch.device) -> str:
    """The name of a device's card in this table; the interpreter's on a CPU is CUDA's."""
    if device.type == "cuda":
        return HOPPER if torch.cuda.get_device_capability(device) == (9, 0) else CUDA
    if device.type == "xpu":
        return ARC if "Arc(TM) A" in torch.xpu.get_device_name(device) else XE
    return CUDA


def choose_decode(card: str, group: int, head_dim: int, is_int8: bool) -> DecodeTiles:
    """Tiles for `group` heads that share a kv head of `head_dim`."""
    if card in (HOPPER, CUDA):
        return DecodeTiles(
            tile=16, warps=1, stages=3, min_split=64, max_splits=32, use_dot=True, merges=True
        )
    return DecodeTiles(
        tile=16, warps=4, stages=1, min_split=64, max_splits=16, use_dot=False, merges=False
    )


def choose_prefill(card: str, head_dim: int, is_int8: bool) -> PrefillTiles:
    """Tiles for prompts."""
    if card in (HOPPER, CUDA):
        return PrefillTiles(queries=64, keys=64, warps=4, stages=2)
    return PrefillTiles(queries=16, keys=32, warps=4, stages=1)

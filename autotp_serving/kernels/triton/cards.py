"""Tiles, warps and paths for each card: the one place that knows them. No device is needed here.

Hopper's were measured on an H100; the Intel ones are the largest that Intel's compiler keeps in
registers (docs/gpu.md has both tables).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module

import torch

HOPPER = "hopper"
CUDA = "cuda"
ARC = "arc"
"""Arc A-series (`acm-g10`): 128 registers of 32 bytes a thread, no matrix unit in Triton 3.3."""
XE = "xe"
"""Data Center Max (`pvc`), and Intel cards that are not known better."""

Options = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class DecodeTiles:
    """How single tokens attend. Nothing of it may depend on a batch, or results would.

    Attributes:
        tile: positions at a time.
        min_split, max_splits: positions in a split at least, a multiple of tile; splits of a
            context at most, a power of two.
        use_dot: a program takes all heads of a kv head by matrix products, else one head by sums.
        merges: the last split to arrive merges them, else a second kernel with `merge_warps`.
        many_rows, splits_of_many: rows from which on a program takes so many splits, one after
            another; a power of two, at most max_splits.
        overlapping_rows: rows up to which the kernel begins while the one before it ends, and asks
            for its keys and values meanwhile; more would keep others from running.
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
    many_rows: int = 1
    splits_of_many: int = 1
    overlapping_rows: int = 0
    options: Options = ()


@dataclass(frozen=True)
class PrefillTiles:
    """How prompts attend: queries and keys at a time."""

    queries: int
    keys: int
    warps: int
    stages: int
    options: Options = ()


def make_intel_options(is_large: bool = False) -> Options:
    """Sub-groups of 16, and twice the registers if asked.

    With 32 lanes a thread's registers hold half as many numbers of each, and Intel's compiler moves
    what does not fit to scratch memory, often without calling it spilled.
    """
    fields = import_module("triton.backends.intel.compiler").XPUOptions.__dataclass_fields__
    name = "warp_size" if "warp_size" in fields else "threads_per_warp"  # new and old Triton
    return ((name, 16), *([("grf_mode", "large")] if is_large else []))


def find_card(device: torch.device) -> str:
    """The name of a device's card in this table; a CPU, for the interpreter, counts as CUDA."""
    find = {"cuda": _find_cuda_card, "xpu": _find_intel_card}.get(device.type)
    return CUDA if find is None else find(device)


def _find_cuda_card(device: torch.device) -> str:
    return HOPPER if torch.cuda.get_device_capability(device) == (9, 0) else CUDA


def _find_intel_card(device: torch.device) -> str:
    return ARC if "Arc(TM) A" in torch.xpu.get_device_name(device) else XE


def choose_decode(card: str, group: int, head_dim: int, is_int8: bool) -> DecodeTiles:
    """Tiles for `group` heads that share a kv head of `head_dim`."""
    if card in (ARC, XE):
        # A lane holds 16 numbers of a tile of keys and of one of values; codes are unpacked.
        warps = 4 if head_dim <= 64 else 8 if head_dim <= 128 else 16
        tile = 8 if is_int8 and card == ARC else 16
        options = make_intel_options()
        return DecodeTiles(tile, warps, 1, 64, 16, False, False, merge_warps=8, options=options)
    if group == 1 and not is_int8:
        tiles = DecodeTiles(
            16, 1, 3, min_split=64, max_splits=32, use_dot=True, merges=True, many_rows=8,
            splits_of_many=2,
        )  # fmt: skip
    elif group == 1:
        tiles = DecodeTiles(16, 1, 2, min_split=64, max_splits=16, use_dot=False, merges=True)
    elif not is_int8:
        tiles = DecodeTiles(64, 4, 2, min_split=64, max_splits=16, use_dot=True, merges=False)
    else:
        tiles = DecodeTiles(32, 1, 2, min_split=64, max_splits=16, use_dot=True, merges=False)
    return replace(tiles, overlapping_rows=1) if card == HOPPER else tiles


def choose_prefill(card: str, head_dim: int, is_int8: bool) -> PrefillTiles:
    """Tiles for prompts."""
    if card == ARC:
        return PrefillTiles(16, 16, warps=16, stages=1, options=make_intel_options(is_large=True))
    if card == XE:
        return PrefillTiles(64, 32, warps=16, stages=1, options=make_intel_options(is_large=True))
    if head_dim > 128:
        return PrefillTiles(queries=64, keys=32, warps=4, stages=1 if is_int8 else 2)
    return PrefillTiles(queries=64, keys=64, warps=4, stages=1 if is_int8 else 2)


def choose_store_options(device: torch.device) -> dict[str, object]:
    """Options for the kernel that stores new tokens."""
    return dict(make_intel_options()) if find_card(device) in (ARC, XE) else {}

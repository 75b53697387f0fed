"""Reads the bytes of ipex-llm's native library: blocks of 64 weights into codes, scales, mins.

Found by changing one weight at a time and looking which bits follow. numpy only, since the
script that makes the golden file uses it too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Name: (ipex-llm's id, bytes per block of 64 weights).
NATIVE_FORMATS = {
    "sym_int4": (2, 34),
    "asym_int4": (3, 36),
    "sym_int5": (6, 42),
    "asym_int5": (7, 44),
    "sym_int8": (8, 68),
    "nf4": (10, 34),
    "nf3": (11, 26),
    "fp8_e4m3": (15, 68),
    "fp4": (16, 34),
    "fp8_e5m2": (19, 68),
    "fp6": (29, 50),
    "woq_int4": (34, 34),
}


class NativeBlocks(NamedTuple):
    """Codes uint8 `[n, 64]`; scales and mins float32 `[n, 1]` or None."""

    codes: np.ndarray
    scales: np.ndarray | None
    mins: np.ndarray | None


def read_blocks(data: np.ndarray, name: str) -> NativeBlocks:
    """Read uint8 `[n, bytes per block]`."""
    half, single = np.float16, np.float32
    if name in ("sym_int4", "woq_int4", "fp4"):
        return NativeBlocks(_nibbles(data[:, 2:]), _numbers(data[:, :2], half), None)
    if name == "asym_int4":
        scales, mins = _numbers(data[:, :2], half), _numbers(data[:, 2:4], half)
        return NativeBlocks(_nibbles(data[:, 4:]), scales, mins)
    if name == "sym_int5":
        codes = _nibbles(data[:, 10:]) | _bits(data[:, 2:10]) << 4
        return NativeBlocks(codes, _numbers(data[:, :2], half), None)
    if name == "asym_int5":
        codes = _nibbles(data[:, 12:]) | _bits(data[:, 4:12]) << 4
        return NativeBlocks(codes, _numbers(data[:, :2], half), _numbers(data[:, 2:4], half))
    if name in ("sym_int8", "fp8_e4m3"):
        return NativeBlocks(data[:, 4:], _numbers(data[:, :4], single), None)
    if name == "fp8_e5m2":
        # The first four bytes are a float32 scale that is always 1.
        return NativeBlocks(data[:, 4:], None, None)
    if name == "nf4":
        codes = np.concatenate([data[:, 2:] >> 4, data[:, 2:] & 15], 1)
        return NativeBlocks(codes, _numbers(data[:, :2], half), None)
    if name == "nf3":
        low = np.stack([data[:, 10:] >> shift & 3 for shift in (6, 4, 2, 0)], 2)
        codes = low.reshape(len(data), 64) | _bits(data[:, 2:10]) << 2
        return NativeBlocks(codes, _numbers(data[:, :2], half), None)
    return NativeBlocks(_fp6_codes(data), _numbers(data[:, 48:], half), None)


def _nibbles(data: np.ndarray) -> np.ndarray:
    return np.concatenate([data & 15, data >> 4], 1)


def _bits(data: np.ndarray) -> np.ndarray:
    return np.unpackbits(data, axis=1, bitorder="little")


def _numbers(data: np.ndarray, dtype: type) -> np.ndarray:
    return data.copy().view(dtype).astype(np.float32)


def _fp6_codes(data: np.ndarray) -> np.ndarray:
    """fp6 keeps four low bits and two high bits apart, in groups of 16, columns shuffled."""
    codes = np.empty((len(data), 64), np.uint8)
    for position in range(64):
        group, rest = divmod(position, 16)
        line, column = divmod(rest, 4)
        column = (1, 3, 0, 2)[column]
        low = data[:, group * 8 + line // 2 * 4 + column] >> (4, 0)[line % 2] & 15
        high = data[:, 32 + group * 4 + column] >> (6, 4, 2, 0)[line] & 3
        codes[:, position] = low | high << 4
    return codes

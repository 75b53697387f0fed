"""Codes to bytes and back, inside blocks of 64. Same on all ranks and devices.

The order of codes within a block's bytes is chosen for vector units and is the same everywhere:

- 8 bits: as they are.
- 4 bits: byte i holds code i (low nibble) and code 32 + i (high). One load of 32 bytes, a mask
  and a shift give two vectors of codes in natural order; ggml packs so too.
- 2 bits: byte i holds codes i, 16 + i, 32 + i, 48 + i, low bits first, for the same reason.
- 1 bit: bit i of the block's 8 bytes, little-endian, belongs to code i: the block is one 64-bit
  AVX-512 mask register, ready for a masked add, and a plain shift by `i % 8` elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autotp_serving.low_bit.formats import BLOCK, split_code_bits


def pack(codes: Tensor, code_bits: int) -> dict[str, Tensor]:
    """Pack uint8 codes `[n, 64]` into the planes `codes` and, for 3, 5 and 6 bits, `high`.

    Each plane is uint8 `[n, bits * 8]`, where bits is the plane's share of `code_bits`.
    """
    low_bits, high_bits = split_code_bits(code_bits)
    if not high_bits:
        return {"codes": _pack_width(codes, low_bits)}
    low = _pack_width(codes & (2**low_bits - 1), low_bits)
    return {"codes": low, "high": _pack_width(codes >> low_bits, high_bits)}


def unpack(planes: dict[str, Tensor], code_bits: int) -> Tensor:
    """Undo `pack`: uint8 codes `[n, 64]`."""
    low_bits, high_bits = split_code_bits(code_bits)
    codes = _unpack_width(planes["codes"], low_bits)
    if high_bits:
        codes |= _unpack_width(planes["high"], high_bits) << low_bits
    return codes


def _pack_width(codes: Tensor, width: int) -> Tensor:
    """Codes below `2**width` `[n, 64]` to bytes `[n, 8 * width]`."""
    if width == 8:
        return codes
    per_byte = 8 // width
    if width == 1:
        lanes = codes.view(-1, BLOCK // 8, 8).unbind(2)
    else:
        lanes = codes.view(-1, per_byte, BLOCK // per_byte).unbind(1)
    packed = lanes[0].clone()
    for index in range(1, per_byte):
        packed |= lanes[index] << (index * width)
    return packed


def _unpack_width(packed: Tensor, width: int) -> Tensor:
    """Bytes `[n, 8 * width]` to codes `[n, 64]`; always a fresh tensor but for 8 bits."""
    if width == 8:
        return packed
    per_byte = 8 // width
    mask = 2**width - 1
    lanes = [(packed >> (index * width)) & mask for index in range(per_byte - 1)]
    lanes.append(packed >> (8 - width))
    return torch.stack(lanes, 2 if width == 1 else 1).view(-1, BLOCK)

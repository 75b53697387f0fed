"""What the pieces of a vocabulary stand for, in bytes. Rank 0 only, standard library only.

Decoding a token by itself loses a leading space in some vocabularies and half a character in
others; logprobs and grammars need the bytes as they are.
"""

from __future__ import annotations

import re

BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def _make_byte_of() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + number): byte for number, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


BYTE_OF = _make_byte_of()


def byte_level_bytes(piece: str) -> bytes:
    """Bytes of a piece of a byte-level vocabulary (GPT-2, Llama 3, Qwen)."""
    if all(char in BYTE_OF for char in piece):
        return bytes(BYTE_OF[char] for char in piece)
    return piece.encode()


def sentencepiece_bytes(piece: str) -> bytes:
    """Bytes of a piece of a sentencepiece vocabulary (Llama 2, Gemma)."""
    match = BYTE_PIECE.fullmatch(piece)
    if match is not None:
        return bytes([int(match[1], 16)])
    return piece.replace("\u2581", " ").encode()

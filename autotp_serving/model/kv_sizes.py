"""What a token's keys and values take in the cache. Every rank; no torch, as --plan is quick."""

from __future__ import annotations

SCALE_BYTES = 4
"""Of the float32 that a token's key, or value, of one head is multiplied by in an int8 cache."""


def count_head_bytes(key_dim: int, value_dim: int, itemsize: int, is_int8: bool) -> int:
    """Bytes of one token's key and value of one head.

    Args:
        itemsize: bytes of one activation, which the cache holds as they are unless `is_int8`.
    """
    if is_int8:
        return key_dim + value_dim + 2 * SCALE_BYTES
    return (key_dim + value_dim) * itemsize

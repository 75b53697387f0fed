"""KV blocks on their way between the cache and the ranks' files. Rank 0 writes one, all obey.

Standard library only.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

KEY_BYTES = 32

FIRST_NUMBER = -1
"""With which no batch begins."""


@dataclass(slots=True)
class BlockTransfer:
    """What each rank does with its own share of these blocks, in this order.

    Attributes:
        drops: slots of the files that hold nothing any more.
        stores: (block, slot, key): copy a block of the cache into a slot.
        loads: (block, slot, key): copy the slot into a block, if it holds that key, undamaged.
    """

    drops: list[int] = field(default_factory=list)
    stores: list[tuple[int, int, bytes]] = field(default_factory=list)
    loads: list[tuple[int, int, bytes]] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """Pack into native 32-bit integers, and the keys."""
        numbers = array("i", (FIRST_NUMBER, len(self.drops), len(self.stores), len(self.loads)))
        numbers.extend(self.drops)
        keys = b""
        for block, slot, key in (*self.stores, *self.loads):
            numbers.extend((block, slot))
            keys += key
        return numbers.tobytes() + keys

    @staticmethod
    def is_one(message: bytes) -> bool:
        """Whether these bytes are a transfer, and no batch."""
        return message.startswith(array("i", (FIRST_NUMBER,)).tobytes())

    @staticmethod
    def from_bytes(data: bytes) -> BlockTransfer:
        """Inverse of `to_bytes`, on a machine of the same byte order."""
        numbers = array("i")
        size = numbers.itemsize
        numbers.frombytes(data[: 4 * size])
        _, num_drops, num_stores, num_loads = numbers
        num_moves = num_stores + num_loads
        start = size * (4 + num_drops + 2 * num_moves)
        numbers.frombytes(data[4 * size : start])
        pairs = numbers[4 + num_drops :]
        moves = [
            (pairs[2 * i], pairs[2 * i + 1], data[start + KEY_BYTES * i :][:KEY_BYTES])
            for i in range(num_moves)
        ]
        drops = numbers[4 : 4 + num_drops].tolist()
        return BlockTransfer(drops, moves[:num_stores], moves[num_stores:])

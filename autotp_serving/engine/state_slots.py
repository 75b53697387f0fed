"""Which states at the ends of blocks are kept, for models whose layers have some. Rank 0 only.

A sequence may begin with blocks that it knows only where the state after the last of them is kept
too: a copy in a row of the ranks' pools of states that no running sequence owns. Rows are few, and
the least recently used one makes room for the next.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence


class StateSlots:
    """Hands out rows for states, and knows of which block's end each holds one.

    A row is free, reserved (a step in flight fills it) or attached to a block whose content is
    known. Copies run in the order in which they were asked for, so a row may be given away while
    one from or to it is still under way.

    Args:
        rows: those of the pools that are for this.
    """

    def __init__(self, rows: range) -> None:
        self._rows = rows
        self._free = list(rows)
        self._row_of: OrderedDict[int, int] = OrderedDict()  # by block, oldest use first

    def find(self, blocks: Sequence[int]) -> tuple[list[int], int | None]:
        """Cut a known beginning down to the last block whose state is kept.

        Returns:
            Those blocks, and the state's row; none, and None, where no state is kept.
        """
        for count in range(len(blocks), 0, -1):
            row = self._row_of.get(blocks[count - 1])
            if row is not None:
                self._row_of.move_to_end(blocks[count - 1])
                return list(blocks[:count]), row
        return [], None

    def reserve(self) -> int | None:
        """A row for a state that is on its way; None when all are for such."""
        if self._free:
            return self._free.pop()
        return self._row_of.popitem(last=False)[1] if self._row_of else None

    def attach(self, block: int, row: int) -> None:
        """The reserved row holds the state at the end of this block, if none does already."""
        if block in self._row_of:
            self.free(row)
        else:
            self._row_of[block] = row

    def free(self, row: int) -> None:
        """Give a reserved row back."""
        self._free.append(row)

    def forget(self, block: int) -> None:
        """The block's content is not known any more."""
        if block in self._row_of:
            self.free(self._row_of.pop(block))

    def check_integrity(self, known_blocks: Collection[int], reserved: Sequence[int]) -> None:
        """Audit: each row is in one place. Raises AssertionError."""
        rows = [*self._free, *self._row_of.values(), *reserved]
        assert sorted(rows) == list(self._rows), "a row of states is lost"
        assert set(self._row_of) <= set(known_blocks), "a state of a block that is forgotten"

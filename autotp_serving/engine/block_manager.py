"""Blocks of the KV cache: who holds which, and which still hold a known beginning. Rank 0 only.

Paging after Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
PagedAttention". A full block may be reused by every sequence that begins with the same tokens:
blocks form a chain in which each is known by its parent's content and its own tokens.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count

from autotp_serving.engine.block_store import BlockStore
from autotp_serving.engine.state_slots import StateSlots
from autotp_serving.request import Adapter

ContentKey = tuple[int, tuple[int, ...]]
"""(content number of the block before, tokens of this block). The dictionary compares it whole, so
a hash collision can never serve a wrong block."""

NO_PARENT = -1
"""Content number before a sequence's first block."""


def find_root(adapter: Adapter | None) -> int:
    """What stands in its place: keys and values of one adapter are never another's."""
    return NO_PARENT if adapter is None else NO_PARENT - adapter.number


class BlockManager:
    """Hands out blocks by number; knows nothing of what a block is made of.

    A block is held (by one or more block tables), cached (held by none, content still known, first
    in the least recently used order to be taken) or free. Every call is O(1) per block it touches.

    Args:
        num_blocks: blocks in the pool.
        block_size: tokens a block holds.
        enable_prefix_caching: False makes every block private and forgotten on release.
        states: of models that have them, the states kept at the ends of known blocks.
        store: keeps known blocks beyond the pool.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        states: StateSlots | None = None,
        store: BlockStore | None = None,
    ) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.states = states
        self.store = store
        self._enable_prefix_caching = enable_prefix_caching
        self._num_holders = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._block_of: dict[ContentKey, int] = {}
        self._key_of: list[ContentKey | None] = [None] * num_blocks
        self._content_of: list[int | None] = [None] * num_blocks
        self._content_numbers = count()

    @property
    def num_available(self) -> int:
        """Blocks that can be handed out now, those with a cached content included."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - self.num_available

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def match(self, token_ids: Sequence[int], root: int = NO_PARENT) -> list[int]:
        """Blocks that hold the longest known beginning of `token_ids`, none taken yet.

        The last token is never covered: it has to run for its logits. Another thread may ask too,
        and has a guess for an answer.

        Args:
            root: content number before the first block, as `find_root` has it.
        """
        blocks: list[int] = []
        if not self._enable_prefix_caching:
            return blocks
        content = root
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            key = (content, tuple(token_ids[start : start + self.block_size]))
            block = self._block_of.get(key)
            if block is None:
                break
            known = self._content_of[block]
            if known is None:  # handed out a moment ago, while another thread looks
                break
            blocks.append(block)
            content = known
        return blocks

    def count_known(self, token_ids: Sequence[int]) -> int:
        """Leading tokens that need not be computed; for other threads, and so a guess."""
        matched = self.match(token_ids)
        num_known = len(matched) + len(self.find_stored(token_ids, matched, len(token_ids)))
        return num_known * self.block_size

    def find_stored(
        self, token_ids: Sequence[int], known: Sequence[int], max_tokens: int
    ) -> list[bytes]:
        """What is stored of the blocks after the known ones, for `load`; never the last token's."""
        num_blocks = min(max_tokens, len(token_ids) - 1) // self.block_size
        if self.store is None or num_blocks <= len(known):
            return []
        span = range(len(known), num_blocks)
        return self.store.find(token_ids, known[-1] if known else None, span, self.block_size)

    def num_needed(self, num_tokens: int, matched: Sequence[int]) -> int:
        """Available blocks that holding `num_tokens` tokens would use up, reusing `matched`."""
        num_shared = sum(self._num_holders[block] > 0 for block in matched)
        return self.num_blocks_for(num_tokens) - num_shared

    def take(self, block_table: list[int], matched: Sequence[int]) -> None:
        """Begin an empty block table with the blocks that `match` found just now."""
        assert not block_table
        for block in matched:
            if self._num_holders[block] == 0:
                del self._cached[block]
            self._num_holders[block] += 1
        block_table.extend(matched)

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Append blocks until the table covers `num_tokens`; False, nothing done, if too few."""
        num_missing = self.num_blocks_for(num_tokens) - len(block_table)
        if num_missing > self.num_available:
            return False
        for _ in range(num_missing):
            block_table.append(self._allocate())
        return True

    def shrink(self, block_table: list[int], num_tokens: int) -> None:
        """Give up the blocks at a table's end that `num_tokens` tokens do not need.

        They were taken for tokens that did not come to stay, such as refused drafts.
        """
        for _ in range(len(block_table) - self.num_blocks_for(num_tokens)):
            self._drop(block_table.pop())

    def register(
        self,
        block_table: list[int],
        index: int,
        token_ids: Sequence[int],
        root: int = NO_PARENT,
    ) -> bool:
        """Make block `index` of a table known by its `token_ids`, a full block of them.

        Call it once the step that fills the block has run, and for block after block in order, with
        the same `root` (see `find_root`) for all; what belongs to an adapter is not stored.
        Where another block has the same content already, the table takes that one instead, so
        that equal prompts which arrived together end up sharing memory.

        Returns:
            Whether the table changed.
        """
        if not self._enable_prefix_caching:
            return False
        assert len(token_ids) == self.block_size
        block = block_table[index]
        parent = self._content_of[block_table[index - 1]] if index else root
        assert parent is not None, f"block {index} is registered before the one it follows"
        key = (parent, tuple(token_ids))
        known = self._block_of.get(key)
        if known is None:
            self._block_of[key] = block
            self._key_of[block] = key
            self._content_of[block] = next(self._content_numbers)
            if (
                self.store is not None and root == NO_PARENT
            ):  # adapters' numbers end with the server
                self.store.note(block, block_table[index - 1] if index else None, token_ids)
        elif known != block:
            if self._num_holders[known] == 0:
                del self._cached[known]
            self._num_holders[known] += 1
            block_table[index] = known
            self._drop(block)
            return True
        return False

    def release(self, block_table: list[int], *, forget: bool = False) -> None:
        """Give up all blocks of a table and empty it.

        Last block first: a later block is of no use without those before it, so it goes first.

        Args:
            forget: the contents are not to be trusted, nobody may find them again.
        """
        for block in reversed(block_table):
            if forget:
                if self.store is not None and self._key_of[block] is not None:
                    self.store.discard(block)
                self._forget(block)
            self._drop(block)
        block_table.clear()

    def check_integrity(
        self, block_tables: Iterable[Sequence[int]], reserved_states: Sequence[int] = ()
    ) -> None:
        """Audit: the tables given are all there are. Raises AssertionError naming what is off."""
        holders = Counter(block for table in block_tables for block in table)
        expected = [holders[block] for block in range(self.num_blocks)]
        assert self._num_holders == expected, "holder counts differ from the block tables"
        idle = [*self._free, *self._cached]
        assert len(idle) == len(set(idle)), "a block is on two lists"
        assert set(idle) == {b for b, num in enumerate(expected) if not num}, "a block is lost"
        assert all(self._key_of[block] is None for block in self._free), "a free block is known"
        assert all(self._key_of[block] is not None for block in self._cached), "no content cached"
        known = {key: block for block, key in enumerate(self._key_of) if key is not None}
        assert known == self._block_of, "the index differs from the blocks"
        if self.states is not None:
            self.states.check_integrity(known.values(), reserved_states)

    def _allocate(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._content_of[block] = None
        self._num_holders[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self._num_holders[block] -= 1
        assert self._num_holders[block] >= 0, f"block {block} released twice"
        if self._num_holders[block] == 0:
            if self._key_of[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def _forget(self, block: int) -> None:
        # The content number stays until the block is handed out again: blocks registered after this
        # one still need it as their parent, and nobody can reach them without finding it first.
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key]
            self._key_of[block] = None
            if self.states is not None:
                self.states.forget(block)
            if self.store is not None:
                self.store.forget(block)

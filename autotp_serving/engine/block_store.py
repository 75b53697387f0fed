"""Which KV blocks the ranks keep in files beyond the pool, and which are to go there. Rank 0 only.

A block goes into the files once, soon after it is full, and stays there when the pool needs its
room; so it also comes back after a preemption and after a restart. Storing takes a small share of
the time that steps take, and what is left of it waits until nothing runs. Loading is done where it
was seen to be quicker than computing.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice

from autotp_serving.block_transfer import BlockTransfer

STORE_SHARE = 0.02
"""Of the time of steps that storing may add to them."""

MAX_SAVED_SECONDS = 0.5
"""Of that share which long steps leave to short ones."""

MAX_STORED_BLOCKS = 32
"""In one go, while a request may come."""

MIN_COMPUTED_TOKENS = 64
"""A step of fewer tells little of what a token of a prompt costs."""

NEW_SHARE = 0.5
"""Weight of a measured time beside those before."""

RETRY_INTERVAL = 32
"""Loads left out because computing was quicker, after which one is tried all the same."""


class BlockStore:
    """Knows the files' slots by what they hold; a slot may fail to hold it, which loading finds.

    A block is known by a digest of its own tokens and of all before them.

    Args:
        slots: (slot, key) of every slot, the next to be written first; an empty one has no key.
        transfer: has all ranks move blocks; returns the indices of loads that failed on any.
    """

    def __init__(
        self,
        slots: Sequence[tuple[int, bytes]],
        transfer: Callable[[BlockTransfer], list[int]],
    ) -> None:
        self.num_stored = self.num_loaded = 0
        self._transfer = transfer
        self._empty = [slot for slot, key in slots if not key][::-1]
        self._slot_of = OrderedDict((key, slot) for slot, key in slots if key)  # oldest first
        self._key_of: dict[int, bytes] = {}  # by block of the pool, of those ever registered
        self._unsaved: OrderedDict[int, None] = OrderedDict()  # blocks, oldest first
        self._drops: list[int] = []
        self._seconds_left = 0.0
        self._store_seconds = 0.0  # of a block
        self._load_seconds = 0.0  # of a block
        self._compute_seconds = 0.0  # of a token
        self._num_left_out = 0

    @property
    def has_unsaved(self) -> bool:
        """Whether blocks wait to be stored, or slots to be dropped."""
        return bool(self._unsaved or self._drops)

    def note(self, block: int, parent: int | None, token_ids: Sequence[int]) -> None:
        """A block of the pool is full, after its parent: it is to be stored, unless it is."""
        key = self._digest(self._find_parent(parent), token_ids)
        self._key_of[block] = key
        if key in self._slot_of:
            self._slot_of.move_to_end(key)
        else:
            self._unsaved[block] = None

    def forget(self, block: int) -> None:
        """The pool is about to lose a block; it stays in the files if it is there."""
        self._unsaved.pop(block, None)

    def discard(self, block: int) -> None:
        """A block is not to be trusted, here or in the files."""
        self._unsaved.pop(block, None)
        key = self._key_of.get(block)
        if key is not None and key in self._slot_of:
            self._drops.append(self._give_up(key))

    def find(
        self,
        token_ids: Sequence[int],
        parent: int | None,
        span: range,
        block_size: int,
    ) -> list[bytes]:
        """Keys of the blocks of these indices that are stored, up to the first that is not.

        Args:
            parent: the block of the pool before them; None for the first.
        """
        keys: list[bytes] = []
        key = self._find_parent(parent)
        for index in span:
            key = self._digest(key, token_ids[index * block_size : (index + 1) * block_size])
            if key not in self._slot_of:
                break
            keys.append(key)
        return keys

    def load(self, blocks: Sequence[int], keys: Sequence[bytes], block_size: int) -> int:
        """Fill blocks of the pool from the files; returns how many are right, from the first on.

        It does nothing where computing them was seen to be quicker.
        """
        if self._load_seconds > block_size * self._compute_seconds > 0.0:
            self._num_left_out += 1
            if self._num_left_out % RETRY_INTERVAL:
                return 0
        slots = [self._slot_of[key] for key in keys]
        started = time.perf_counter()
        failed = self._transfer(BlockTransfer(loads=list(zip(blocks, slots, keys, strict=True))))
        seconds = (time.perf_counter() - started) / len(keys)
        self._load_seconds = _blend(self._load_seconds, seconds)
        for index in failed:
            self._empty.append(self._give_up(keys[index]))
        num_loaded = min(failed, default=len(keys))
        self.num_loaded += num_loaded
        return num_loaded

    def add_step(self, num_tokens: int, seconds: float) -> None:
        """Take note of how long a step lasted, and store for a share of that time."""
        if num_tokens >= MIN_COMPUTED_TOKENS:
            self._compute_seconds = _blend(self._compute_seconds, seconds / num_tokens)
        left = self._seconds_left + STORE_SHARE * seconds
        self._seconds_left = min(left, MAX_SAVED_SECONDS)
        while self.has_unsaved and self._seconds_left > 0.0:
            self._seconds_left -= self.store(int(self._seconds_left / (self._store_seconds or 1)))

    def store(self, num_blocks: int = MAX_STORED_BLOCKS) -> float:
        """Store the oldest blocks that wait, at least one and not too many; returns seconds."""
        num_blocks = min(max(1, num_blocks), MAX_STORED_BLOCKS)
        transfer = BlockTransfer(drops=self._drops)
        self._empty += self._drops
        self._drops = []
        for block in list(islice(self._unsaved, num_blocks)):
            del self._unsaved[block]
            key = self._key_of[block]
            if key in self._slot_of:
                continue
            slot = self._empty.pop() if self._empty else self._slot_of.popitem(last=False)[1]
            self._slot_of[key] = slot
            transfer.stores.append((block, slot, key))
        if not (transfer.stores or transfer.drops):
            return 0.0
        started = time.perf_counter()
        self._transfer(transfer)
        seconds = time.perf_counter() - started
        if transfer.stores:
            self.num_stored += len(transfer.stores)
            self._store_seconds = _blend(self._store_seconds, seconds / len(transfer.stores))
        return seconds

    def _give_up(self, key: bytes) -> int:
        return self._slot_of.pop(key)

    def _find_parent(self, parent: int | None) -> bytes:
        return b"" if parent is None else self._key_of.get(parent, b"")

    @staticmethod
    def _digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
        text = parent + array("i", token_ids).tobytes()
        return hashlib.blake2b(text, digest_size=32).digest()


def _blend(before: float, measured: float) -> float:
    return NEW_SHARE * measured + (1 - NEW_SHARE) * before if before else measured

"""What is kept of the latest responses, in memory and within bounds. Rank 0 only.

Items, for clients that refer to them instead of sending them: Vercel's SDK does so with the model's
own text and reasoning, unless told `store: false`. With --responses-store whole responses too. What
is oldest is forgotten first, and nothing outlives the process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

from autotp_serving.api.responses.schemas import InputItem

MAX_ITEMS = 2**14
MAX_CHARS = 2**24
"""Of all texts that are kept."""

Kept = TypeVar("Kept")


class BoundedMemory(Generic[Kept]):
    """Remembers entries by their id and by whose they are.

    Args:
        max_entries: so many at most.
        max_chars: of all entries.
    """

    def __init__(self, max_entries: int, max_chars: int) -> None:
        self._entries: OrderedDict[tuple[str, str], tuple[Kept, int]] = OrderedDict()
        self._max_entries = max_entries
        self._max_chars = max_chars
        self._num_chars = 0

    def keep(self, tenant: str, entry_id: str, entry: Kept, num_chars: int) -> None:
        """Remember an entry, and forget what is too much then.

        Args:
            tenant: whose it is; nobody else finds it.
            entry_id: by which it is found.
            entry: what is kept.
            num_chars: its size.
        """
        self._entries[tenant, entry_id] = entry, num_chars
        self._num_chars += num_chars
        while len(self._entries) > self._max_entries or self._num_chars > self._max_chars:
            _, (_, size) = self._entries.popitem(last=False)
            self._num_chars -= size

    def find(self, tenant: str, entry_id: str) -> Kept | None:
        """The entry, if it is still remembered."""
        found = self._entries.get((tenant, entry_id))
        return None if found is None else found[0]

    def forget(self, tenant: str, entry_id: str) -> bool:
        """Drop an entry. False where there is none."""
        found = self._entries.pop((tenant, entry_id), None)
        self._num_chars -= 0 if found is None else found[1]
        return found is not None


class ItemMemory(BoundedMemory[InputItem]):
    """Remembers items of responses."""

    def __init__(self, max_items: int = MAX_ITEMS, max_chars: int = MAX_CHARS) -> None:
        super().__init__(max_items, max_chars)

    def keep_all(self, tenant: str, items: Iterable[Mapping[str, Any]]) -> None:
        """Remember the output of a response, its items as the response has them."""
        for one in items:
            item = InputItem.model_validate(one)
            self.keep(tenant, one["id"], item, len(item.model_dump_json()))

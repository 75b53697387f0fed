"""Items of the latest responses, for clients that refer to them instead of sending them. Rank 0.

Vercel's SDK does so with the model's own text and reasoning, unless told `store: false`. This is no
store of responses: what is oldest is forgotten first, and nothing outlives the process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from autotp_serving.api.responses.schemas import InputItem

MAX_ITEMS = 2**14
MAX_CHARS = 2**24
"""Of all texts that are kept."""


class ItemMemory:
    """Remembers items by their id and by whose they are."""

    def __init__(self, max_items: int = MAX_ITEMS, max_chars: int = MAX_CHARS) -> None:
        self._items: OrderedDict[tuple[str, str], tuple[InputItem, int]] = OrderedDict()
        self._max_items = max_items
        self._max_chars = max_chars
        self._num_chars = 0

    def keep(self, tenant: str, items: Iterable[Mapping[str, Any]]) -> None:
        """Remember the output of a response.

        Args:
            tenant: whose it is; nobody else finds it.
            items: as the response has them.
        """
        for one in items:
            item = InputItem.model_validate(one)
            size = len(item.model_dump_json())
            self._items[tenant, one["id"]] = item, size
            self._num_chars += size
        while len(self._items) > self._max_items or self._num_chars > self._max_chars:
            _, (_, size) = self._items.popitem(last=False)
            self._num_chars -= size

    def find(self, tenant: str, item_id: str) -> InputItem | None:
        """The item, if it is still remembered."""
        found = self._items.get((tenant, item_id))
        return None if found is None else found[0]

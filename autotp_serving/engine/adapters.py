"""Which LoRA adapters are loaded, under which names and in which slots. Rank 0 only.

The engine's thread changes the table, others read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import count

from autotp_serving.request import Adapter, AdapterError, Request

NAME = re.compile(r"[!-~]{1,200}")


class AdapterTable:
    """Adapters by name, and the slots that ranks keep them in.

    An adapter that is unloaded keeps its slot until the last request with it has ended.

    Args:
        num_slots: as many may be loaded; 0: none, as the server takes no adapters.
        taken: names that are the model's.
    """

    def __init__(self, num_slots: int, taken: Sequence[str] = ()) -> None:
        self._num_slots = num_slots
        self._taken = frozenset(taken)
        self._loaded: dict[str, Adapter] = {}
        self._leaving: list[Adapter] = []
        self._numbers = count(1)

    @property
    def loaded(self) -> list[Adapter]:
        """Those that requests may ask for, as they came."""
        return list(self._loaded.values())

    @property
    def held(self) -> list[Adapter]:
        """Those that ranks have to keep: loaded ones, and those whose last requests still run."""
        return [*self._loaded.values(), *self._leaving]

    @property
    def has_leaving(self) -> bool:
        """Whether some wait for their last requests."""
        return bool(self._leaving)

    def find(self, name: str) -> Adapter | None:
        """The adapter of this name, None if none is loaded."""
        return self._loaded.get(name)

    def is_loaded(self, adapter: Adapter) -> bool:
        """Whether requests may still begin with it."""
        return self._loaded.get(adapter.name) is adapter

    def make(self, name: str, path: str) -> Adapter:
        """Choose a slot for a newcomer, which is not in the table before `add`.

        Raises:
            AdapterError: there is no room for it, or its name is taken or none.
        """
        if not self._num_slots:
            raise AdapterError("this server takes no adapters: start it with --enable-lora")
        if not NAME.fullmatch(name):
            raise AdapterError("the name must be 1 to 200 visible ASCII characters without spaces")
        if name in self._loaded or name in self._taken:
            raise AdapterError(f"the name '{name}' is taken: unload that adapter, or use another")
        free = set(range(1, self._num_slots + 1)) - {one.slot for one in self.held}
        if not free:
            raise AdapterError(
                f"{self._num_slots} adapters are loaded, or in use by requests that still run "
                "(--max-loras): unload one"
            )
        return Adapter(name, path, min(free), next(self._numbers))

    def add(self, adapter: Adapter) -> None:
        """It is on all ranks."""
        self._loaded[adapter.name] = adapter

    def remove(self, name: str) -> None:
        """Have no more requests begin with an adapter.

        Raises:
            AdapterError: there is none of this name.
        """
        adapter = self._loaded.pop(name, None)
        if adapter is None:
            raise AdapterError(f"no adapter is loaded as '{name}'")
        self._leaving.append(adapter)

    def take_unused(self, active: Iterable[Request]) -> list[Adapter]:
        """Forget those that are unloaded and that no request uses any more."""
        used = {request.adapter for request in active}
        unused = [one for one in self._leaving if one not in used]
        self._leaving = [one for one in self._leaving if one in used]
        return unused


def parse_adapters(settings: Sequence[str]) -> list[tuple[str, str]]:
    """Names and folders of --lora-modules, which are checked already."""
    return [(name, path) for name, _, path in (one.partition("=") for one in settings)]

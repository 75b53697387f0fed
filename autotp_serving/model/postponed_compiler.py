"""Keeps torch's compiler out of a start: transformers names it, a server never runs it. Every rank.

To import it takes each rank half a second of processor time and 100 MB of memory. transformers'
modeling code wants one submodule, which needs nothing of the package, and it and torch mark
functions for the compiler; no setting leaves that out. A submodule's package is looked up in
`sys.modules` alone, so there is no way but to put one there for a while.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

NAME = "torch._dynamo"
MARKS = ("allow_in_graph", "assume_constant_result", "disable")


class PostponedPackage(ModuleType):
    """The package before its code has run. Asked for anything but marks it runs, and is the package
    from then on.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if name.startswith("__") or spec is None or spec.loader is None:
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)


@contextlib.contextmanager
def postpone_compiler() -> Iterator[None]:
    """While transformers builds something. What is marked for the compiler meanwhile is left as it
    is, which matters to nobody who does not compile it.
    """
    spec = None if NAME in sys.modules else importlib.util.find_spec(NAME)
    if spec is None:
        yield
        return
    package = importlib.util.module_from_spec(spec)
    package.__class__ = PostponedPackage
    package.__dict__.update(dict.fromkeys(MARKS, leave))
    sys.modules[NAME] = package
    try:
        yield
    finally:
        if isinstance(package, PostponedPackage):  # whoever wants it later gets a fresh one
            del sys.modules[NAME]


def leave(function: Any = None, *_: Any, **__: Any) -> Any:
    """The function as it is; without one, what leaves it so."""
    return leave if function is None else function

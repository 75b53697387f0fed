"""Memory that the C library keeps after it was freed. Any process; short, as all rooms share it."""

from __future__ import annotations

import ctypes


def return_free_memory() -> None:
    """Have the C library return what was freed inside its heap; by itself it keeps most of it.

    Nothing where it is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

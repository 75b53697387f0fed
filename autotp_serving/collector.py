"""The garbage collector while something large is imported. Any process.

What is imported stays. To look through it again and again, as there comes to be more of it, takes
the collector a fifth of all the time that importing torch, transformers and DeepSpeed takes.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Collect no garbage meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

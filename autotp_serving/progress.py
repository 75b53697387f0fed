"""What a start is waiting for, told in lines of the log: far along, and still at it. Every rank.

No bar: the ranks' lines go through the launcher, and into files, where one would be written over
and over. Rank 0 alone speaks.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

logger = logging.getLogger(__name__)

SECONDS = 2.0
"""At most so long is nothing heard."""


def show_size(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} kB"


class Progress:
    """Counts something long, and logs at times how far it is.

    Args:
        what: as the line begins.
        total: how many bytes, or `unit`, there are.
        is_shown: False for ranks that are not to speak.
    """

    def __init__(
        self, what: str, total: int, unit: str = "bytes", *, is_shown: bool = True
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._is_shown = is_shown
        self._done = 0
        self._said_at = time.monotonic()

    def advance(self, number: int = 1) -> None:
        """So many more are done."""
        self.reach(self._done + number)

    def reach(self, done: int) -> None:
        """So many are done in all; nothing is said of the end, of which others tell."""
        self._done = done
        now = time.monotonic()
        if not self._is_shown or now - self._said_at < SECONDS or done >= self._total:
            return
        self._said_at = now
        if self._unit == "bytes":
            there, all_ = show_size(done), show_size(self._total)
        else:
            there, all_ = str(done), f"{self._total} {self._unit}"
        logger.info("%s: %s of %s", self._what, there, all_)


@contextlib.contextmanager
def tell_silence() -> Iterator[None]:
    """While this lasts, repeat the log's latest line whenever nothing else is said."""
    latest = _Latest()
    has_ended = threading.Event()

    def tell() -> None:
        while not has_ended.wait(0.5):
            if time.monotonic() - latest.heard_at >= SECONDS:
                latest.repeat()

    package = logging.getLogger("autotp_serving")
    package.addHandler(latest)
    threading.Thread(target=tell, daemon=True, name="tell-silence").start()
    try:
        yield
    finally:
        has_ended.set()
        package.removeHandler(latest)


class _Latest(logging.Handler):
    """Remembers what was said last, and when."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.heard_at = self._began_at = time.monotonic()
        self._message = "Starting"

    def emit(self, record: logging.LogRecord) -> None:
        self.heard_at = time.monotonic()
        if record.name != __name__:
            self._began_at = self.heard_at
            self._message = record.getMessage()

    def repeat(self) -> None:
        seconds = time.monotonic() - self._began_at
        logger.info("Still at it after %.0f s: %s", seconds, self._message)

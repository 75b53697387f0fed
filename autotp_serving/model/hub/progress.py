"""A download that is watched: room on the disk, lines of progress, an end if it stalls.

One rank of each host. Progress is read off the disk, as bytes of the files that grow there, so it
does not depend on which package brings them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from autotp_serving.config import ConfigError
from autotp_serving.distributed.launch import LaunchError
from autotp_serving.progress import Progress, show_size

logger = logging.getLogger(__name__)

STALL_SECONDS = 300.0
STALL_BYTES = 2**20
"""A download that brings less than this in that time is given up."""
ATTEMPTS = 3
"""Of a file whose transfer broke off so that the hub's package gave up on it."""


def check_room(name: str, num_bytes: int, folder: Path, variable: str) -> None:
    """Refuse a download for which the disk has no room.

    Raises:
        ConfigError: with both sizes.
    """
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise ConfigError(
            f"{name} takes {show_size(num_bytes)}, and the disk of {folder} has {show_size(free)} "
            f"free: make room, or set {variable} to a folder on another disk"
        )


def watch_download(name: str, total: int, folder: Path, fetch: Callable[[], None]) -> None:
    """Run `fetch` in a thread of its own, show how far it is, and give up on one that stalls.

    Args:
        total: bytes to come.
        folder: in which they appear.

    Raises:
        LaunchError: it has stalled; its threads can only be left by leaving the process.
        Exception: what `fetch` raised.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            fetch()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="download")
    before = _count_bytes(folder)
    thread.start()
    seen, seen_at = 0, time.monotonic()
    logger.info("Downloading %s: %s", name, show_size(total))
    progress = Progress(f"Downloading {name}", total)
    while thread.is_alive():
        thread.join(0.5)
        done = max(0, _count_bytes(folder) - before)
        progress.reach(done)
        now = time.monotonic()
        if done >= seen + STALL_BYTES or done < seen:
            seen, seen_at = done, now
        if now - seen_at > STALL_SECONDS and done < total:
            raise LaunchError(
                f"{name}: the download has stalled: in {STALL_SECONDS:.0f} s came less than "
                f"{show_size(STALL_BYTES)}: start again, files that are complete are kept"
            )
    if failure:
        raise failure[0]
    logger.info("Downloaded %s", name)


def _count_bytes(folder: Path) -> int:
    """Bytes on the disk of a folder's files, those that are being written included."""
    num_bytes = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                num_bytes += min(found.st_size, found.st_blocks * 512)
    return num_bytes


def try_again(fetch: Callable[[], None]) -> None:
    """Repeat what a broken connection has ended; files that are complete are not fetched again."""
    for attempt in range(ATTEMPTS):
        try:
            return fetch()
        except Exception as error:
            is_refused = getattr(getattr(error, "response", None), "status_code", 500) < 500
            is_local = isinstance(error, OSError) and error.errno is not None
            if is_refused or is_local or attempt == ATTEMPTS - 1:
                raise
            logger.warning(
                "The download broke off (%s: %s) and goes on",
                type(error).__name__,
                one_line(error),
            )
            time.sleep(1.0 + attempt)
    return None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

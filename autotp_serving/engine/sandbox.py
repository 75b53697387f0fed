"""Work on clients' texts in processes that may crash, loop or run out of memory. Rank 0 only.

One helper process (`sandbox_helper` here, `sandbox_worker` there) is started from scratch, loads
what the work needs, and forks workers that each take one job at a time. They inherit no socket of
ours, have a limit of memory and stack, stand back for everything else on the machine (nice 15, for
long jobs 19), and end with this process.
"""

from __future__ import annotations

import contextlib
import logging
import marshal
import os
import threading
import time
import weakref
from concurrent.futures import Future
from functools import partial
from typing import Any

from autotp_serving.engine.sandbox_helper import (
    MAX_WAIT_SECONDS,
    Helper,
    HelperGoneError,
    SandboxBusyError,
)
from autotp_serving.engine.shortest_first import ShortestFirst
from autotp_serving.engine.tokenizer import Tokenizer
from autotp_serving.engine.vocabulary import list_vocabulary

logger = logging.getLogger(__name__)

KINDS = {"grammar": 2, "render": 2, "body": 1}
"""How many jobs of each kind run at once, so that no kind waits for another."""


class Spool:
    """A file in memory, there until the last who knows it lets it go.

    Attributes:
        descriptor: of the file.
        size: bytes written.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("spool")
        self.size = 0
        weakref.finalize(self, os.close, self.descriptor)

    def write(self, data: bytes) -> None:
        """Append. Raises OSError where there is no memory for it."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.descriptor, view) :]
        self.size += len(data)

    def read(self) -> bytes:
        """All of it."""
        with open(self.descriptor, "rb", buffering=0, closefd=False) as file:
            file.seek(0)
            return file.read()


class Sandbox:
    """Runs jobs in helper processes. All methods are safe in any thread.

    Args:
        tokenizer: whose chat template and tokens the helper loads before its first job.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._helper: Helper | None = None
        self._is_closed = False
        self._queues = {
            kind: ShortestFirst(number, f"sandbox-{kind}") for kind, number in KINDS.items()
        }

    def start(self) -> Future[None]:
        """Start the helper now rather than for the first job; the future is done once it can."""
        return self._queues["grammar"].submit(0, lambda: self._find_helper().wait_ready())

    def submit(
        self, kind: str, data: Any, size: int, seconds: float, file: Spool | None = None
    ) -> Future[Any]:
        """Queue a job, the smallest first.

        Args:
            kind: one of KINDS.
            data: what `sandbox_worker` wants for this kind; plain values that `marshal` takes.
            size: of the job, in characters.
            seconds: of processor time that it may take.
            file: handed to the worker, where a kind wants one.

        Returns:
            A future that has the answer, or raises RefusalError, SandboxError or
            SandboxBusyError.
        """
        submitted = time.monotonic()
        work = partial(self._run, kind, data, seconds, submitted, file)
        return self._queues[kind].submit(size, work)

    def close(self) -> None:
        """End the helper and its workers."""
        with self._lock:
            self._is_closed = True
            if self._helper is not None:
                self._helper.close()

    def _run(
        self, kind: str, data: Any, seconds: float, submitted: float, file: Spool | None
    ) -> Any:
        request = marshal.dumps((kind, seconds, data))
        files = () if file is None else (file.descriptor,)
        for _ in range(2):
            helper = self._find_helper()
            helper.wait_ready()
            if time.monotonic() > max(submitted, helper.ready_time) + MAX_WAIT_SECONDS:
                raise SandboxBusyError
            with contextlib.suppress(HelperGoneError):
                return helper.run(request, seconds, files)
        raise SandboxBusyError

    def _find_helper(self) -> Helper:
        """The helper, started anew if it is gone."""
        with self._lock:
            if self._is_closed:
                raise SandboxBusyError
            if self._helper is not None and not self._helper.is_alive:
                logger.warning("the helper process for clients' texts ended; starting another")
                self._helper.close()
                self._helper = None
            if self._helper is None:
                # The kernel ends it with the thread that starts it, and those of a queue never end.
                self._helper = Helper(_describe(self._tokenizer))
                weakref.finalize(self, self._helper.close)
            return self._helper


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the helper has to know, see `sandbox_worker.Setup`."""
    template = tokenizer.template
    return {
        "template": template
        and {"sources": template.sources, "special_tokens": template.special_tokens},
        "vocabulary": list_vocabulary(tokenizer),
    }

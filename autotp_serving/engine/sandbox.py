"""Work on clients' texts in processes that may crash, loop or run out of memory. Rank 0 only.

One helper process (`sandbox_worker`) is started from scratch, loads what the work needs, and forks
workers that each take one job at a time. They inherit no socket of ours, have a limit of memory and
stack, stand back for everything else on the machine (nice 19), and end with this process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import marshal
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from autotp_serving.engine.shortest_first import ShortestFirst
from autotp_serving.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 10.0
"""How long a job may wait for a free worker."""

START_SECONDS = 120.0
"""How long the helper may take to load, on a machine that is busy loading a model."""

SLACK = 5.0
"""On a busy machine a job may take so many times its deadline by the clock."""

MIN_SHARE = 0.25
MIN_SHARE_AT_LAST = 0.05
CERTAIN_SHARE = 0.5
"""Of the processor time that a job may take: with the first it is late once its deadline is over by
the clock, with the second once SLACK is over too, and with the third it would be late again."""

POLL_SECONDS = 0.25

KINDS = ("grammar", "render")
NUM_AT_ONCE = 2
"""Jobs of each kind that run at once, so that neither kind waits for the other."""

LAUNCHER_NAMES = re.compile(
    r"PMI|PMIX|HYD|MPI|OMPI|PRTE|I_MPI|UCX_|FI_|CCL_|TORCHELASTIC|GROUP_|ROLE_|SLURM_"
    r"|(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$"
    r"|AUTOTP_API_KEY"
)
"""Environment that makes a process a rank, and secrets: a helper has no use for either."""

REPLY_HEAD = struct.Struct("!Q")


class SandboxError(Exception):
    """A job that failed for its own fault; the message says how, as in "took longer than 2 s".

    Args:
        is_certain: it would fail again; False if a busy machine may have had a part in it.
    """

    def __init__(self, message: str, *, is_certain: bool = True) -> None:
        super().__init__(message)
        self.is_certain = is_certain


class SandboxBusyError(Exception):
    """A job that was not done for want of a free worker or of processor time."""


class RefusalError(Exception):
    """The job's own answer: no, and why."""


class Sandbox:
    """Runs jobs in helper processes. All methods are safe in any thread.

    Args:
        tokenizer: whose chat template and tokens the helper loads before its first job.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._helper: _Helper | None = None
        self._is_closed = False
        self._queues = {kind: ShortestFirst(NUM_AT_ONCE, f"sandbox-{kind}") for kind in KINDS}

    def start(self) -> Future[None]:
        """Start the helper now rather than for the first job; the future is done once it can."""
        return self._queues["grammar"].submit(0, lambda: self._find_helper().wait_ready())

    def submit(self, kind: str, data: Any, size: int, seconds: float) -> Future[Any]:
        """Queue a job, the smallest first.

        Args:
            kind: one of KINDS.
            data: what `sandbox_worker` wants for this kind; plain values that `marshal` takes.
            size: of the job, in characters.
            seconds: of processor time that it may take.

        Returns:
            A future that has the completion, or raises RefusalError, SandboxError or
            SandboxBusyError.
        """
        submitted = time.monotonic()
        return self._queues[kind].submit(size, partial(self._run, kind, data, seconds, submitted))

    def close(self) -> None:
        """End the helper and its workers."""
        with self._lock:
            self._is_closed = True
            if self._helper is not None:
                self._helper.close()

    def _run(self, kind: str, data: Any, seconds: float, submitted: float) -> Any:
        request = marshal.dumps((kind, seconds, data))
        for _ in range(2):
            helper = self._find_helper()
            helper.wait_ready()
            if time.monotonic() > max(submitted, helper.ready_time) + MAX_WAIT_SECONDS:
                raise SandboxBusyError
            with contextlib.suppress(_HelperGoneError):
                return helper.run(request, seconds)
        raise SandboxBusyError

    def _find_helper(self) -> _Helper:
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
                self._helper = _Helper(_describe(self._tokenizer))
                weakref.finalize(self, self._helper.close)
            return self._helper


class _HelperGoneError(Exception):
    """The helper ended, through no fault of the job."""


class _Helper:
    """One helper process and the socket at which its workers wait."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._group, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._group.settimeout(MAX_WAIT_SECONDS)
        environ = {
            name: value for name, value in os.environ.items() if not LAUNCHER_NAMES.match(name)
        }
        package = str(Path(__file__).parents[2])
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environ.get("PYTHONPATH")]))
        module = "autotp_serving.engine.sandbox_worker"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what a library says in its last moment
                pass_fds=(theirs.fileno(),),
                close_fds=True,
                env=environ,
            )
        self._setup: bytes | None = marshal.dumps(setup)
        self._ready_lock = threading.Lock()
        self._is_closed = False
        self.ready_time = 0.0

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Hand over the setup, once, and wait until the first worker answers.

        Raises SandboxBusyError.
        """
        with self._ready_lock:
            if self._setup is None:
                return
            try:
                self._process.stdin.write(self._setup)
                self._process.stdin.close()
                self._ask(marshal.dumps(("ping", 1.0, None)), 1.0, START_SECONDS)
            except (OSError, _HelperGoneError, SandboxError) as error:
                if not self._is_closed:  # the server may end before the helper is ready
                    reason = str(error) or "it ended"
                    logger.error("the helper process for clients' texts does not start: %s", reason)
                self.close()
                raise SandboxBusyError from error
            self._setup = None
            self.ready_time = time.monotonic()

    def run(self, request: bytes, seconds: float) -> Any:
        """Have a worker do a job. Raises like `Sandbox.submit`, and _HelperGoneError."""
        reply = json.loads(self._ask(request, seconds, MAX_WAIT_SECONDS))
        if "refusal" in reply:
            raise RefusalError(reply["refusal"])
        if "failure" in reply:
            raise SandboxError(reply["failure"])
        return reply["answer"]

    def _ask(self, request: bytes, seconds: float, wait_seconds: float) -> bytes:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                try:
                    socket.send_fds(self._group, [b"job"], [theirs.fileno()])
                except OSError as error:
                    raise _HelperGoneError from error
            ours.settimeout(wait_seconds)
            try:
                (pid,) = REPLY_HEAD.unpack(_read(ours, REPLY_HEAD.size))
            except TimeoutError as error:
                raise SandboxBusyError from error
            except EOFError as error:
                raise _HelperGoneError from error
            try:
                ours.sendall(REPLY_HEAD.pack(len(request)) + request)
            except TimeoutError as error:
                raise SandboxBusyError from error
            except OSError as error:
                raise _HelperGoneError from error
            ours.settimeout(POLL_SECONDS)
            watch = partial(_watch, pid, time.monotonic(), _cpu_seconds(pid), seconds)
            try:
                (size,) = REPLY_HEAD.unpack(_read(ours, REPLY_HEAD.size, watch))
                return _read(ours, size, watch)
            except (OSError, EOFError) as error:
                if not self.is_alive:
                    raise _HelperGoneError from error
                raise SandboxError("is too deep, too large or too complex") from error

    def close(self) -> None:
        """End it and its workers; those that are idle see the socket close."""
        self._is_closed = True
        self._group.close()
        with contextlib.suppress(OSError):
            self._process.kill()
            self._process.wait(5.0)
        with contextlib.suppress(OSError):
            self._process.stdin.close()


def list_vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """A vocabulary's fields as plain values, for another process."""
    return {
        "tokens": [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)],
        "special_token_ids": sorted(tokenizer.special_token_ids),
        "eos_token_ids": sorted(tokenizer.eos_token_ids),
    }


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the helper has to know, see `sandbox_worker.Setup`."""
    template = tokenizer.template
    return {
        "template": template
        and {"sources": template.sources, "special_tokens": template.special_tokens},
        "vocabulary": list_vocabulary(tokenizer),
    }


def _read(sock: socket.socket, size: int, on_timeout: Callable[[], None] | None = None) -> bytes:
    """Exactly so many bytes. Raises EOFError, OSError and what `on_timeout` raises."""
    data = bytearray()
    while len(data) < size:
        try:
            part = sock.recv(min(size - len(data), 2**20))
        except TimeoutError:
            if on_timeout is None:
                raise
            on_timeout()
            continue
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _watch(pid: int, started: float, cpu_before: float, seconds: float) -> None:
    """End a worker that has had its time. It has not ended by itself, so the id is its own.

    By the clock, a machine whose processors are taken would make every job late: a worker that got
    next to nothing of its time may go on for a while.
    """
    elapsed = time.monotonic() - started
    if elapsed < seconds:
        return
    share = (_cpu_seconds(pid) - cpu_before) / seconds
    is_over = elapsed > SLACK * seconds
    if share < MIN_SHARE and not is_over:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if share < MIN_SHARE_AT_LAST:
        raise SandboxBusyError
    raise SandboxError(f"took longer than {seconds:g} s", is_certain=share >= CERTAIN_SHARE)


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

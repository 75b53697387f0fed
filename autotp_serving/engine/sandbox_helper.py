"""The helper process of `sandbox`, as rank 0 sees it: started, asked, watched, ended. Rank 0."""

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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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

POLL_SECONDS = 0.05

QUICK_CPU_SECONDS = 0.1
LONG_NICENESS = 19
"""Of a job once it has taken more than that: what is quick gets its share of a busy machine, and
what is not waits for everything else."""

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


class HelperGoneError(Exception):
    """The helper ended, through no fault of the job."""


class Helper:
    """One helper process and the socket at which its workers wait."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._group, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._group.settimeout(MAX_WAIT_SECONDS)
        environ = {
            name: value for name, value in os.environ.items() if not LAUNCHER_NAMES.match(name)
        }
        package = str(Path(__file__).parents[2])
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environ.get("PYTHONPATH")]))
        environ["USE_TORCH"] = "0"  # for transformers 4, which imports it along with its templates
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
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        self._setup: bytes | None = marshal.dumps(setup)
        self._ready_lock = threading.Lock()
        self._is_closed = False
        self.ready_time = 0.0

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Hand over the setup, once, and wait until the first worker answers.

        Raises SandboxBusyError; one that is just slow is waited for again by the next who calls.
        """
        with self._ready_lock:
            if self._setup is None:
                return
            try:
                if not self._stdin.closed:  # else it is still loading
                    self._stdin.write(self._setup)
                    self._stdin.close()
                self._ask(marshal.dumps(("ping", 1.0, None)), 1.0, START_SECONDS)
            except (OSError, HelperGoneError, SandboxError) as error:
                if not self._is_closed:  # the server may end before the helper is ready
                    reason = str(error) or "it ended"
                    logger.error("the helper process for clients' texts does not start: %s", reason)
                self.close()
                raise SandboxBusyError from error
            self._setup = None
            self.ready_time = time.monotonic()

    def run(self, request: bytes, seconds: float, files: Sequence[int] = ()) -> Any:
        """Have a worker do a job, which gets `files` too, one at most.

        Raises like `Sandbox.submit`, and HelperGoneError.
        """
        reply = json.loads(self._ask(request, seconds, MAX_WAIT_SECONDS, files))
        if "refusal" in reply:
            raise RefusalError(reply["refusal"])
        if "failure" in reply:
            raise SandboxError(reply["failure"])
        return reply["answer"]

    def _ask(
        self, request: bytes, seconds: float, wait_seconds: float, files: Sequence[int] = ()
    ) -> bytes:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                try:
                    socket.send_fds(self._group, [b"job"], [theirs.fileno()])
                except OSError as error:
                    raise HelperGoneError from error
            ours.settimeout(wait_seconds)
            try:
                (pid,) = REPLY_HEAD.unpack(_read(ours, REPLY_HEAD.size))
            except TimeoutError as error:
                raise SandboxBusyError from error
            except EOFError as error:
                raise HelperGoneError from error
            try:
                socket.send_fds(ours, [REPLY_HEAD.pack(len(request))], files)
                ours.sendall(request)
            except TimeoutError as error:
                raise SandboxBusyError from error
            except OSError as error:
                raise HelperGoneError from error
            ours.settimeout(POLL_SECONDS)
            watch = partial(_watch, pid, time.monotonic(), cpu_seconds(pid), seconds)
            try:
                (size,) = REPLY_HEAD.unpack(_read(ours, REPLY_HEAD.size, watch))
                return _read(ours, size, watch)
            except (OSError, EOFError) as error:
                if not self.is_alive:
                    raise HelperGoneError from error
                raise SandboxError("is too deep, too large or too complex") from error

    def close(self) -> None:
        """End it and its workers; those that are idle see the socket close."""
        self._is_closed = True
        self._group.close()
        with contextlib.suppress(OSError):
            self._process.kill()
            self._process.wait(5.0)
        with contextlib.suppress(OSError):
            self._stdin.close()


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
    spent = cpu_seconds(pid) - cpu_before
    if spent > QUICK_CPU_SECONDS:
        with contextlib.suppress(OSError):  # it has just ended
            os.setpriority(os.PRIO_PROCESS, pid, LONG_NICENESS)
    if elapsed < seconds:
        return
    share = spent / seconds
    is_over = elapsed > SLACK * seconds
    if share < MIN_SHARE and not is_over:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if share < MIN_SHARE_AT_LAST:
        raise SandboxBusyError
    raise SandboxError(f"took longer than {seconds:g} s", is_certain=share >= CERTAIN_SHARE)


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has just ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

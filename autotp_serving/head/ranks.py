"""One group of ranks as the head sees it: launcher, processes, connections. Head only.

Ranks come to a Unix socket with no file, at which the head admits only its own user's processes
that show a secret from the environment it gave them; it is closed as soon as all are there.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from autotp_serving.config import ServingConfig
from autotp_serving.distributed.channel import GREETING_SECONDS, LENGTH, SECRET_LEN, SILENT_SHARE
from autotp_serving.distributed.peer_monitor import PeerMonitor
from autotp_serving.head.places import GroupPlace
from autotp_serving.head.rank_side import HEAD_NAME
from autotp_serving.head.wire import Line, LineClosed, Ready

PEER_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid

LAUNCHER_SECONDS = 2.0
"""What the launcher gets to clean up once its ranks are gone."""

REFUSAL_SECONDS = 1.0
"""In which another rank may still say why one has ended while they load."""

STOP_SECONDS = 10.0
KILL_SECONDS = 30.0

TORCHRUN = "torch.distributed.run"

CHECK_SECONDS = 60.0
CHECK_PROGRAM = "from mpi4py import MPI; raise SystemExit(MPI.COMM_WORLD.Get_size() != 2)"


class RanksLost(Exception):
    """The group has ended; the sentence says how."""


class RanksRefused(Exception):
    """The group cannot start, and starting it again would not help; the message has the cure."""


def find_launcher(num_ranks: int) -> list[str]:
    """The command before a rank's own: none for one rank, `mpirun` if it works, or `torchrun`."""
    if num_ranks == 1:
        return []
    folders = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    mpirun = shutil.which("mpirun", path=folders)
    if mpirun is not None and find_spec("mpi4py") is not None:
        for flags in (["--prepend-rank"], []):  # Open MPI has another name for it
            command = [mpirun, *flags, "-np", "2", sys.executable, "-c", CHECK_PROGRAM]
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_SECONDS
                )
                if done.returncode == 0:
                    return [mpirun, *flags, "-np", str(num_ranks)]
    flags = ["--standalone", "--no-python", f"--nproc-per-node={num_ranks}"]
    return [sys.executable, "-m", TORCHRUN, *flags]


class RankProcesses:
    """Starts a group of ranks, and ends it.

    Args:
        launcher: the command before a rank's own.
        config: the settings that all of them get.
        num_ranks: how many.
        place: where.
        num_loading: groups that are yet to take their part of the host's memory, this one included.
    """

    def __init__(
        self,
        launcher: Sequence[str],
        config: ServingConfig,
        num_ranks: int,
        place: GroupPlace,
        num_loading: int,
    ) -> None:
        self._config = config
        self._num_ranks = num_ranks
        self._secret = secrets.token_bytes(SECRET_LEN)
        self._lines: dict[int, Line] = {}
        self._pulses: dict[int, socket.socket] = {}
        self._processes: list[int] = []  # descriptors, which mean the same process for ever
        self._monitor: PeerMonitor | None = None
        self._lost = threading.Event()
        self._kill_lock = threading.Lock()
        self._reason: str | None = None
        name = f"autotp-serving-{secrets.token_hex(8)}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"\0{name}")
        self._listener.listen()
        told = f"{name} {self._secret.hex()} {num_ranks} {num_loading} {place.name}"
        environ = os.environ | place.environ | {HEAD_NAME: told}
        if TORCHRUN in launcher:  # which would give each a single thread
            num_cores = len(os.sched_getaffinity(0))
            environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // num_ranks)))
        if place.cpus is not None:
            os.sched_setaffinity(0, place.cpus)  # this thread's, which the ranks inherit
        self._launcher = subprocess.Popen(
            [*launcher, sys.executable, *sys.orig_argv[1:]],
            env=environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl+C is the head's alone
        )

    @property
    def line(self) -> Line:
        """The connection to rank 0."""
        return self._lines[0]

    def wait_ready(self, seconds: float) -> Ready:
        """Wait until all ranks have loaded.

        Raises:
            RanksRefused: they say that they cannot start.
            RanksLost: they have ended, or need longer.
        """
        deadline, reason = time.monotonic() + seconds, f"they were not ready after {seconds:.0f} s"
        ready: Ready | None = None
        launcher = os.pidfd_open(self._launcher.pid)
        with self._listener, selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(launcher, selectors.EVENT_READ)

            def expect_end(what: str, ended: socket.socket | int) -> None:
                nonlocal deadline, reason
                selector.unregister(ended)
                if deadline > time.monotonic() + REFUSAL_SECONDS:
                    deadline, reason = time.monotonic() + REFUSAL_SECONDS, what

            try:
                while ready is None or len(self._lines) + len(self._pulses) < 2 * self._num_ranks:
                    events = selector.select(max(0.0, deadline - time.monotonic()))
                    if not events and time.monotonic() >= deadline:
                        raise RanksLost(reason)
                    for key, _ in events:
                        if key.fileobj is self._listener:
                            rank = self._admit()
                            if rank is not None:
                                connection = self._lines[rank].connection
                                selector.register(connection, selectors.EVENT_READ, rank)
                        elif key.fileobj == launcher:
                            expect_end("their launcher has ended", launcher)
                        else:
                            try:
                                kind, *rest = self._lines[key.data].receive()
                            except LineClosed:
                                expect_end(f"rank {key.data} has died", key.fd)
                                continue
                            if kind == "refused":
                                raise RanksRefused(*rest)
                            ready = Ready(*rest)
            finally:
                os.close(launcher)
        return ready

    def _admit(self) -> int | None:
        """Take a connection in; the rank whose line it is, None for a pulse or a stranger."""
        peer, _ = self._listener.accept()
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
        pid, uid, _ = PEER_CREDENTIALS.unpack(credentials)
        peer.settimeout(GREETING_SECONDS)
        greeting = b""
        if uid == os.getuid():
            with contextlib.suppress(OSError):  # a stranger who says nothing
                greeting = peer.recv(SECRET_LEN + LENGTH.size, socket.MSG_WAITALL)
        if not hmac.compare_digest(greeting[:SECRET_LEN], self._secret):
            peer.close()
            return None
        peer.settimeout(None)
        (number,) = LENGTH.unpack(greeting[SECRET_LEN:])
        if number >= self._num_ranks:
            self._pulses[number - self._num_ranks] = peer
            return None
        rank: int = number
        self._lines[rank] = Line(peer)
        self._note_process(pid)
        with contextlib.suppress(LineClosed):  # which shows again when it is read from
            self._lines[rank].send(asdict(self._config))
        return rank

    def _note_process(self, pid: int) -> None:
        """Keep hold of a rank, and of the process that stands in for it before the launcher."""
        with contextlib.suppress(OSError):  # it has died meanwhile
            self._processes.append(os.pidfd_open(pid))
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            parent = int(fields[1])
            if b"stand_in.py" in Path(f"/proc/{parent}/cmdline").read_bytes():
                # To be killed first: it would tell of the rank's end, which is no news.
                self._processes.insert(0, os.pidfd_open(parent))

    def watch(self) -> None:
        """Notice from now on when a rank dies or is stopped."""
        self._monitor = PeerMonitor(
            {f"rank {rank}": line.connection for rank, line in self._lines.items()},
            self.lose,
            pulses={f"rank {rank}": pulse for rank, pulse in self._pulses.items()},
            silence_seconds=SILENT_SHARE * self._config.step_timeout,
        )

    def lose(self, reason: str) -> None:
        """Take the group for ended: whoever waits for it wakes. For any thread."""
        if self._reason is None:
            self._reason = reason
        with contextlib.suppress(OSError, KeyError):
            # Of this side alone: the rank, if it lives, is not to think that the head has died.
            self.line.connection.shutdown(socket.SHUT_RD)
        self._lost.set()

    def wait_loss(self) -> str:
        """Wait until the group has ended; how."""
        self._lost.wait()
        assert self._reason is not None
        return self._reason

    def stop(self) -> None:
        """Let ranks that wait for a step end by themselves, and end those that do not."""
        self._stop_watching()
        if self._monitor is not None:  # they do not load any more
            with contextlib.suppress(LineClosed, subprocess.TimeoutExpired):
                self.line.send(("stop",))
                self._launcher.wait(STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End every process of the group at once, and wait until they are gone."""
        self._stop_watching()
        with self._kill_lock:
            self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        try:
            self._launcher.wait(LAUNCHER_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._launcher.pid, signal.SIGKILL)
            self._launcher.wait(KILL_SECONDS)
        deadline = time.monotonic() + KILL_SECONDS
        for process in self._processes:
            with selectors.DefaultSelector() as selector:  # readable once it is gone
                selector.register(process, selectors.EVENT_READ)
                selector.select(max(0.0, deadline - time.monotonic()))
            os.close(process)
        self._processes.clear()
        for connection in (*(line.connection for line in self._lines.values()),
                           *self._pulses.values()):  # fmt: skip
            connection.close()

    def _stop_watching(self) -> None:
        if self._monitor is not None:
            self._monitor.stop()

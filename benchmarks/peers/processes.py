"""Starting and ending servers, and what they and everybody else take of the machine. No rank."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT, PeerError

START_SECONDS = 900.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Launch:
    """How to start one server.

    Attributes:
        name: its row in the table.
        words: the command; {port} stands for the port.
        environment: variables beside our own.
        model: what requests call the model.
        extra_body: further fields of each request.
    """

    name: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    model: str = "model"
    extra_body: Mapping[str, Any] = field(default_factory=dict)


class Server:
    """A running server and all its processes; ends with the `with` block."""

    def __init__(self, launch: Launch, log: Path, nice: int = 0) -> None:
        self.launch = launch
        self.log = log
        self.peak_memory = 0
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        words = [word.replace("{port}", str(port)) for word in launch.words]
        words = ["nice", "-n", str(nice), *words] if nice else words
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            settings = " ".join(f"{name}={value}" for name, value in launch.environment.items())
            file.write(f"$ {settings} {' '.join(words)}\n".encode())
            file.flush()
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(launch.environment),
                cwd=ROOT,
                start_new_session=True,
            )
        self._nice = nice

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()  # what is stopped does not end
        processes = self.processes()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in processes:  # workers that outlived their parent
            if process in list_session(self._process.pid):
                send_signal([process], signal.SIGKILL)

    def wait_until_ready(self) -> None:
        """Wait for /health to answer 200. Raises PeerError."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise PeerError(
                    f"{self.launch.name} ended with {self._process.returncode} before it was "
                    f"ready: see {self.log}"
                )
            for process in self.processes() if self._nice else ():
                set_session_nice(process, self._nice)
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                    if response.status == 200:
                        return
            except OSError:  # not listening yet, or 503 while it loads
                pass
            time.sleep(0.5)
        raise PeerError(f"{self.launch.name} was not ready in {START_SECONDS:g} s: see {self.log}")

    def pause(self) -> None:
        """Stop all its processes where they are: waiting servers, too, take processor time."""
        stopped: set[int] = set()
        while more := set(self.processes()) - stopped:  # one may have started another meanwhile
            send_signal(more, signal.SIGSTOP)
            stopped |= more

    def resume(self) -> None:
        """Let all its processes go on."""
        send_signal(self.processes(), signal.SIGCONT)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let it run, and stop it again."""
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def processes(self) -> list[int]:
        """All processes of the server."""
        return list_session(self._process.pid)

    def look_at_memory(self) -> int:
        """PSS of all processes together in bytes; pages shared with others count in parts."""
        total = sum(read_pss(process) for process in self.processes())
        self.peak_memory = max(self.peak_memory, total)
        return total

    def cpu_seconds(self) -> float:
        """Processor time of all its living processes so far."""
        return sum(read_cpu_seconds(process) for process in self.processes())


def send_signal(processes: Iterable[int], number: signal.Signals) -> None:
    """To each of them that is still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def set_session_nice(process: int, nice: int) -> None:
    """Where Linux shares the cores among sessions first, niceness counts within a session only."""
    autogroup = Path(f"/proc/{process}/autogroup")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # no such thing, or gone
        autogroup.write_text(str(nice))


def list_session(leader: int) -> list[int]:
    """Processes of a session, and those whose parent is one of them (some start sessions anew)."""
    parents: dict[int, int] = {}
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        process = int(entry.name)
        parents[process] = int(fields[1])
        if int(fields[3]) == leader:
            found.add(process)
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def read_pss(process: int) -> int:
    """Proportional set size in bytes; 0 for a process that has just gone."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    sizes = [line.split()[1] for line in text.splitlines() if line.startswith("Pss:")]
    return int(sizes[0]) * 1024 if sizes else 0


def read_cpu_seconds(process: int) -> float:
    """User and system time; 0 for a process that has just gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


class Neighbours:
    """How much of the machine others used between two moments: a measure of how far to trust."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._start = self._read()

    def _read(self) -> tuple[float, float, float]:
        busy = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]))
        # user, nice, system, irq, softirq, steal; idle and waiting for disks left out
        used = sum(busy[index] for index in (0, 1, 2, 5, 6, 7)) / TICKS
        own = self._server.cpu_seconds() + read_cpu_seconds(os.getpid())
        return time.monotonic(), used, own

    def share(self) -> float:
        """Share of all cores that neither the server nor this client used, since the start."""
        (t0, used0, own0), (t1, used1, own1) = self._start, self._read()
        others = (used1 - used0) - (own1 - own0)
        return max(0.0, others) / ((t1 - t0) * (os.cpu_count() or 1))

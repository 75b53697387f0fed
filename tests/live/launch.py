"""The real server under a real launcher, with its log and every process it starts."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CACHE_FLAGS = ["--kv-cache-memory", "32MiB"]
TAG_NAME = "AUTOTP_TEST_TAG"
START_SECONDS = 240.0  # the first start of a machine compiles for a minute or two
LAUNCHER_NAMES = re.compile(r"^(PMI|PMIX|HYDI|MPIR|OMPI|TORCHELASTIC|GROUP_|ROLE_)")
RANK_NAMES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"),
}


def mpirun(num_ranks: int) -> list[str]:
    """As the README starts it."""
    return [str(BIN / "mpirun"), "-np", str(num_ranks), "--prepend-rank", sys.executable]


def torchrun(num_ranks: int) -> list[str]:
    """Without mpirun, as on machines that have no MPI."""
    return [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={num_ranks}"]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and all its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def _end_with_parent() -> None:
    """Have the launcher told to end should the tests be killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class Launch:
    """One run of serving.py; its processes are found by a tag in their environment.

    It is the leader of a process group of its own, as a shell would have it.
    """

    def __init__(
        self,
        launcher: Sequence[str],
        log_path: Path,
        *flags: str,
        program: Sequence[str] = ("serving.py",),
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = log_path
        self._tag = uuid.uuid4().hex
        environ = {
            name: value
            for name, value in os.environ.items()
            if not LAUNCHER_NAMES.match(name) and name not in RANK_NAMES
        }
        environ |= {
            TAG_NAME: self._tag,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
        }
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*launcher, *program, "--port", str(self.port), "--host", "127.0.0.1", *flags],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    @property
    def log(self) -> str:
        """All that any rank and the launcher printed."""
        return self.log_path.read_text(errors="replace")

    @property
    def errors(self) -> list[str]:
        """The lines that tell why the server cannot start."""
        return [line for line in self.log.splitlines() if "serving.py: error:" in line]

    def processes(self) -> dict[int, dict[str, str]]:
        """Environment of each process of this run that is alive, the launcher's own included."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended while we looked
                pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                environ = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                if environ.get(TAG_NAME) == self._tag:
                    found[int(folder.name)] = environ
        return found

    def rank_pids(self) -> list[int]:
        """The Python processes that are ranks, in rank order."""
        ranks = {
            int(environ.get("PMI_RANK", environ.get("RANK", 0))): pid
            for pid, environ in self.processes().items()
            if {"PMI_RANK", "RANK"} & set(environ) or pid == self.process.pid
        }
        return [ranks[rank] for rank in sorted(ranks)]

    def wait_ready(self) -> Launch:
        """Wait until the server answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            assert self.process.poll() is None, self.log
            time.sleep(0.1)
        raise AssertionError(f"not ready after {START_SECONDS} s: {self.log}")

    def wait_for(self, check: Callable[[], Any], seconds: float = 20.0) -> None:
        """Wait until `check` is true."""
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def wait(self, seconds: float = START_SECONDS) -> int:
        """Wait for the launcher's end; its exit code. No process may outlive it for long."""
        self.wait_for(lambda: self.process.poll() is not None, seconds)
        self.wait_for(lambda: not self.processes(), 5.0)
        return self.process.returncode

    def interrupt(self) -> None:
        """What Ctrl+C in a terminal does: SIGINT to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def health(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/health", timeout=30).json()

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Wait until nothing runs and every KV block is free."""
        names = ("num_running", "num_waiting", "num_held_blocks")
        self.wait_for(lambda: not any(self.health()[name] for name in names), seconds)

    def generate(self, prompt: str, n_predict: int) -> str:
        """A greedy answer of exactly that many tokens."""
        body = {"prompt": prompt, "n_predict": n_predict, "ignore_eos": True}
        reply = httpx.post(f"{self.url}/generate", json=body, timeout=120)
        assert reply.status_code == 200, reply.text
        return reply.json()["message"]["content"]

    @contextlib.contextmanager
    def stream(self, prompt: str, n_predict: int) -> Iterator[Iterator[dict[str, Any]]]:
        """The lines of a streamed answer as they come; leaving the block closes the connection."""
        body = {"prompt": prompt, "n_predict": n_predict, "ignore_eos": True}
        with httpx.stream("POST", f"{self.url}/generate_stream", json=body, timeout=120) as reply:
            assert reply.status_code == 200
            yield (json.loads(line) for line in reply.iter_lines())

    def clean_up(self) -> None:
        """End what is left, the launcher first, so that it starts nothing anew."""
        for pid in sorted(self.processes()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

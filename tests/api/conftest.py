"""A server in a process of its own, for tests that need real sockets, signals and clients."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]


class LiveServer:
    """`python -m tests.api.service` with everything it prints."""

    def __init__(self, options: dict[str, Any], python: str = sys.executable) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [python, "-m", "tests.api.service", json.dumps(options)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        line = self.wait_for_line("Uvicorn running on")
        self.url = re.search(r"https?://\S+", line)[0]

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for_line(self, words: str, seconds: float = 20.0) -> str:
        """The first line printed that holds `words`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if words in line:
                    return line
            assert self.process.poll() is None or self._reader.is_alive(), self.lines
            time.sleep(0.01)
        raise AssertionError(f"no line with '{words}' in {self.lines}")

    def health(self) -> dict[str, Any]:
        """What /health says."""
        return httpx.get(f"{self.url}/health").json()

    def wait_for_health(
        self, check: Callable[[dict[str, Any]], bool], seconds: float = 5.0
    ) -> None:
        """Wait until /health passes the check."""
        deadline = time.monotonic() + seconds
        while not check(health := self.health()):
            assert time.monotonic() < deadline, health
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 20.0) -> int:
        """Wait for the end; the exit code."""
        code = self.process.wait(seconds)
        self._reader.join(5.0)
        return code

    def stop(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(10.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture(scope="session")
def live() -> Iterator[LiveServer]:
    """As many at once as in ipex-llm's guide: 8 sequences at once, a few milliseconds a step."""
    server = LiveServer({"delay": 0.002, "max_model_len": 4096, "config": {"port": 0}})
    yield server
    server.stop()


@pytest.fixture
def start_server() -> Iterator[Callable[..., LiveServer]]:
    """Starts servers of a test's own; they end with it."""
    servers: list[LiveServer] = []

    def start(**options: Any) -> LiveServer:
        options["config"] = {"port": 0} | options.get("config", {})
        servers.append(LiveServer(options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()

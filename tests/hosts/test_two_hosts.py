"""One model over two machines, started by one script; then the cable between them is cut."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.hosts.network import Host, find_obstacle, two_hosts
from tests.live.launch import CACHE_FLAGS, LAUNCHER_NAMES, RANK_NAMES, ROOT, Launch
from tests.model.checkpoints import save_tiny_llama

OBSTACLE = find_obstacle()
pytestmark = [
    pytest.mark.ranks,
    pytest.mark.live,
    pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE)),
]

FLAGS = ["--low-bit", "bf16", "--dtype", "float32", *CACHE_FLAGS]
PROMPTS = {"a": 12, "The quick brown fox jumps over the lazy dog. ": 40, "0123456789" * 30: 25}
PORT = 8000
START_SECONDS = 240.0
ERROR_SECONDS = 30.0
LEAVE_SECONDS = 45.0


class MultiHostServer:
    """scripts/run_multi_host.sh on the first of the machines."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path, *flags: str) -> None:
        self.lead = hosts[0]
        host_file = folder / "machines"
        host_file.write_text("".join(f"{host.name}:1\n" for host in hosts))
        self._log_path = folder / "server.log"
        script = ["bash", str(ROOT / "scripts/run_multi_host.sh"), str(host_file)]
        own_names = {
            name: value
            for name, value in os.environ.items()
            if not LAUNCHER_NAMES.match(name) and name not in RANK_NAMES
        }
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.lead.command(*script, "--config", "/mnt/serving.yaml", *flags, folder=ROOT),
                env=own_names
                | {
                    "VIRTUAL_ENV": sys.prefix,
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                    "OMP_NUM_THREADS": "1",
                    "HF_HUB_OFFLINE": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        """What the script, the launcher and the ranks printed."""
        return self._log_path.read_text(errors="replace")

    def call(self, function: Callable[[httpx.Client], Any]) -> Any:
        """Speak to the server from its own machine."""

        def run() -> Any:
            with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=120) as client:
                return function(client)

        return self.lead.call(run)

    def wait_ready(self) -> MultiHostServer:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if self.call(lambda client: client.get("/health").status_code) == 200:
                    return self
            assert self.process.poll() is None, self.log
            time.sleep(0.2)
        raise AssertionError(f"not ready after {START_SECONDS} s: {self.log}")

    def generate(self, prompt: str, n_predict: int) -> str:
        """A greedy answer of exactly that many tokens."""
        body = {"prompt": prompt, "n_predict": n_predict, "ignore_eos": True}
        reply = self.call(lambda client: client.post("/generate", json=body))
        assert reply.status_code == 200, reply.text
        return reply.json()["message"]["content"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one rank answers, without any launcher."""
    log_path = tmp_path_factory.mktemp("one_rank") / "log"
    server = Launch([sys.executable], log_path, "--model", str(model_path), *FLAGS)
    try:
        server.wait_ready()
        return {prompt: server.generate(prompt, length) for prompt, length in PROMPTS.items()}
    finally:
        server.clean_up()


@pytest.fixture
def hosts(model_path: Path, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path, model_path) as pair:
        yield pair


def test_two_hosts_answer_as_one_rank_does_until_the_cable_is_cut(
    hosts: tuple[Host, Host], model_path: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Neither sees the other's files; the client is told which is lost, and nobody stays behind."""
    alpha, beta = hosts
    for host in hosts:
        assert "config.json" in host.run("ls", f"/mnt/{host.name}")
        assert host.run("ls", str(model_path)) == ""
    server = MultiHostServer(hosts, tmp_path, *FLAGS).wait_ready()
    for prompt, length in PROMPTS.items():
        assert server.generate(prompt, length) == expected[prompt]
    assert any("serving.py" in words for words in beta.processes().values())

    def read_until_cut(client: httpx.Client) -> tuple[dict[str, Any], float]:
        body = {"prompt": "stream", "n_predict": 1900, "ignore_eos": True}
        last, cut_time = {}, 0.0
        with client.stream("POST", "/generate_stream", json=body) as reply:
            for line in reply.iter_lines():
                last = json.loads(line)
                if last["index"] == 20:
                    beta.run("ip", "link", "set", "eth0", "down")
                    cut_time = time.monotonic()
        return last, time.monotonic() - cut_time

    last, seconds = server.call(read_until_cut)
    assert last["finish_reason"] == "error" and 20 < last["index"] < 1900, last
    assert "rank 1 on host beta is lost" in last["error"]
    assert seconds < ERROR_SECONDS

    deadline = time.monotonic() + LEAVE_SECONDS
    while alpha.processes() or beta.processes():
        assert time.monotonic() < deadline, (alpha.processes(), beta.processes(), server.log)
        time.sleep(0.2)
    assert server.process.wait(10.0) != 0

"""nginx and HAProxy with the configurations of deploy/, before two servers: whole streams, shared
out, and a server that is gone is not missed.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import LiveServer

DEPLOY = Path(__file__).parents[2] / "deploy"
NUM_REQUESTS = 8
PACE = 0.02
"""Seconds that one step of the servers takes."""

NGINX_FRAME = """
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture
def servers() -> Iterator[list[LiveServer]]:
    pair = [LiveServer({"delay": PACE, "config": {"port": 0}}) for _ in range(2)]
    yield pair
    for server in pair:
        server.stop()


def port_of(server: LiveServer) -> str:
    return server.url.rpartition(":")[2]


def start_nginx(folder: Path, text: str, port: int) -> list[str]:
    (folder / "site.conf").write_text(text.replace("listen 80;", f"listen 127.0.0.1:{port};"))
    (folder / "nginx.conf").write_text(NGINX_FRAME.format(folder=folder))
    words = ["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    subprocess.run([*words, "-t"], check=True)
    return words


def start_haproxy(folder: Path, text: str, port: int) -> list[str]:
    path = folder / "haproxy.cfg"
    path.write_text(text.replace("bind :80\n", f"bind 127.0.0.1:{port}\n"))
    subprocess.run(["haproxy", "-c", "-f", str(path)], check=True)
    return ["haproxy", "-db", "-f", str(path)]


@pytest.fixture(params=["nginx", "haproxy"])
def address(
    request: pytest.FixtureRequest, servers: list[LiveServer], tmp_path: Path
) -> Iterator[str]:
    """A balancer before the servers, its configuration changed in nothing but addresses."""
    tool = request.param
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:  # nginx's workers are nobody's
        if parent.owner() == "root" and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    name, start = {"nginx": ("nginx.conf", start_nginx), "haproxy": ("haproxy.cfg", start_haproxy)}[
        tool
    ]
    text = (DEPLOY / name).read_text()
    for number, server in enumerate(servers, start=11):
        assert f"10.0.0.{number}:8000" in text
        text = text.replace(f"10.0.0.{number}:8000", f"127.0.0.1:{port_of(server)}")
    port = free_port()
    process = subprocess.Popen(start(tmp_path, text, port))
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: is_up(url))
        yield url
    finally:
        process.terminate()
        process.wait()


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(check: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_stream(url: str, n_predict: int) -> list[tuple[float, dict]]:
    """The lines of a stream and when they came."""
    body = {"prompt": "What is AI?", "n_predict": n_predict, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/generate_stream", json=body, timeout=60) as reply:
        assert reply.status_code == 200
        return [(time.monotonic(), json.loads(line)) for line in reply.iter_lines()]


def num_done(server: LiveServer) -> int:
    return httpx.get(f"{server.url}/health").json()["num_finished"]["length"]


def test_streams_pass_unbuffered_and_are_shared_out(
    address: str, servers: list[LiveServer]
) -> None:
    started = time.monotonic()
    lines = read_stream(address, 50)
    assert lines[-1][1]["index"] == 50 and lines[-1][1]["finish_reason"] == "length"
    # Held back by a buffer, all of it would come at the end, which is 50 steps away.
    assert lines[0][0] - started < 0.5 * (lines[-1][0] - started)
    before = [num_done(server) for server in servers]
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        list(pool.map(lambda _: read_stream(address, 40), range(NUM_REQUESTS)))
    shares = [num_done(server) - was for server, was in zip(servers, before, strict=True)]
    assert sum(shares) == NUM_REQUESTS and min(shares) >= 2, shares


def test_a_server_that_is_gone_is_not_missed(address: str, servers: list[LiveServer]) -> None:
    servers[0].stop()
    for _ in range(4):
        *_, (_, last) = read_stream(address, 3)
        assert last["finish_reason"] == "length"

"""Real clients and a real server: ipex-llm's curl lines, leaving clients, load, shutdown."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from autotp_serving.api.port import reserve_port
from autotp_serving.config import ConfigError
from tests.api.conftest import ROOT, LiveServer

pytestmark = pytest.mark.live

SEED_CURL = """curl -X 'POST' \\
  'http://127.0.0.1:8000/{route}/' \\
  -H 'accept: application/json' \\
  -H 'Content-Type: application/json' \\
  -d '{{
  "prompt": "What is AI?",
  "n_predict": 32
}}'"""


def is_idle(health: dict[str, Any]) -> bool:
    return health["num_running"] == health["num_waiting"] == 0 and health["num_held_blocks"] == 0


def run_curl(live: LiveServer, command: str) -> str:
    command = command.replace("http://127.0.0.1:8000", live.url)
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True, timeout=20
    ).stdout


TIME = r"\d\d-\d\d \d\d:\d\d:\d\d "


def test_console_shows_the_guides_lines(live: LiveServer) -> None:
    expected = [
        r"INFO:     Started server process \[\d+\]",
        r"INFO:     Waiting for application startup\.",
        r"INFO:     Application startup complete\.",
        r"INFO:     Uvicorn running on http://0\.0\.0\.0:\d+ \(Press CTRL\+C to quit\)",
    ]
    for line, pattern in zip(live.lines, expected, strict=False):
        assert re.fullmatch(TIME + pattern, line), line


def test_guide_curl_generate(live: LiveServer) -> None:
    assert json.loads(run_curl(live, SEED_CURL.format(route="generate"))) == {
        "index": 0,
        "message": {"role": "assistant", "content": "a branch of computer science"},
        "finish_reason": "stop",
    }


def test_guide_curl_generate_stream(live: LiveServer) -> None:
    output = run_curl(live, SEED_CURL.format(route="generate_stream"))
    first, *_, last = output.splitlines()
    assert first == (
        '{"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": null}'
    )
    assert last == (
        '{"index": 29, "message": {"role": "assistant", "content": null}, "finish_reason": "stop"}'
    )


def test_curl_without_a_content_type(live: LiveServer) -> None:
    body = '{"prompt": "What is AI?", "n_predict": 8}'
    output = run_curl(live, f"curl -s http://127.0.0.1:8000/generate -d '{body}'")
    assert json.loads(output)["message"]["content"] == "a branch"


def test_lines_arrive_while_tokens_are_made(start_server: Callable[..., LiveServer]) -> None:
    server = start_server(delay=0.05)
    times = []
    body = {"prompt": "x", "n_predict": 8}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body) as reply:
        for _ in reply.iter_lines():
            times.append(time.monotonic())
    assert len(times) == 9
    assert times[7] - times[0] > 0.2


@pytest.mark.parametrize("route", ["generate", "generate_stream"])
def test_a_client_that_leaves_frees_its_blocks(live: LiveServer, route: str) -> None:
    body = {"prompt": "hello " * 20, "n_predict": 3000, "ignore_eos": True}
    with socket.create_connection(("127.0.0.1", httpx.URL(live.url).port)) as sock:
        data = json.dumps(body).encode()
        head = f"POST /{route} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data)
        live.wait_for_health(lambda health: health["num_running"] == 1)
    live.wait_for_health(is_idle, 1.0)
    assert any(f"POST /{route} 499 " in line for line in live.lines)


def test_a_client_that_leaves_the_queue_never_runs(
    start_server: Callable[..., LiveServer],
) -> None:
    server = start_server(delay=0.01, config={"max_num_seqs": 1})

    async def go() -> None:
        async with httpx.AsyncClient(base_url=server.url) as http:
            long = {"prompt": "first", "n_predict": 100, "ignore_eos": True}
            first = asyncio.create_task(http.post("/generate", json=long))
            others = []
            for route in ("/generate", "/generate_stream"):
                await asyncio.sleep(0.05)
                others.append(asyncio.create_task(http.post(route, json=long)))
            await asyncio.to_thread(
                server.wait_for_health, lambda health: health["num_waiting"] == 2
            )
            for task in others:
                task.cancel()
            await asyncio.to_thread(
                server.wait_for_health, lambda health: health["num_waiting"] == 0, 0.5
            )
            assert not first.done()
            assert (await first).status_code == 200

    asyncio.run(go())
    server.wait_for_health(is_idle)


def test_64_streams_of_mixed_lengths_complete(live: LiveServer) -> None:
    """At the HTTP end: each has its own length, and all blocks come back."""

    async def stream(http: httpx.AsyncClient, index: int) -> int:
        num_predict = 1 + index % 37
        body = {"prompt": f"number {index} " * (1 + index % 9), "n_predict": num_predict}
        body["ignore_eos"] = True
        async with http.stream("POST", "/generate_stream/", json=body) as reply:
            lines = [json.loads(line) async for line in reply.aiter_lines()]
        assert [line["index"] for line in lines] == list(range(num_predict + 1))
        assert lines[-1]["finish_reason"] == "length"
        return num_predict

    async def go() -> None:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=live.url, limits=limits, timeout=60) as http:
            await asyncio.gather(*(stream(http, index) for index in range(64)))

    asyncio.run(go())
    live.wait_for_health(is_idle)


def test_a_storm_of_leaving_clients_leaks_nothing(live: LiveServer) -> None:
    async def leave(http: httpx.AsyncClient, index: int) -> None:
        route = "/generate_stream" if index % 2 else "/generate"
        body = {"prompt": f"storm {index}", "n_predict": 2000, "ignore_eos": True}
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(http.post(route, json=body), 0.01 * (index % 30))

    async def go() -> None:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=live.url, limits=limits, timeout=60) as http:
            await asyncio.gather(*(leave(http, index) for index in range(100)))

    asyncio.run(go())
    live.wait_for_health(is_idle)


def test_access_log_is_one_line_without_the_prompt(live: LiveServer) -> None:
    body = {"prompt": "What is AI?", "n_predict": 8}
    reply = httpx.post(f"{live.url}/generate/", json=body)
    line = live.wait_for_line(reply.headers["x-request-id"])
    assert re.fullmatch(
        TIME + r"INFO:     POST /generate/ 200 \d+\.\d{3}s in=11 out=8 req-[0-9a-f]{32}", line
    )
    httpx.post(f"{live.url}/a%0Ab")
    assert "\\n" in live.wait_for_line("POST /a")


def test_sigterm_lets_running_requests_finish(start_server: Callable[..., LiveServer]) -> None:
    server = start_server(delay=0.02)

    async def go() -> None:
        async with httpx.AsyncClient(base_url=server.url) as http:
            body = {"prompt": "x", "n_predict": 40}
            running = asyncio.create_task(http.post("/generate_stream", json=body))
            await asyncio.to_thread(
                server.wait_for_health, lambda health: health["num_running"] == 1
            )
            server.signal(signal.SIGTERM)
            await asyncio.to_thread(
                server.wait_for_health, lambda health: health["status"] == "draining"
            )
            refused = await http.post("/generate", json=body)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            assert refused.headers["retry-after"]
            assert len((await running).text.splitlines()) == 41

    asyncio.run(go())
    assert server.wait() == 0
    assert not any("Traceback" in line for line in server.lines)


def test_what_outlasts_the_drain_ends_with_an_error(
    start_server: Callable[..., LiveServer],
) -> None:
    server = start_server(delay=0.02, config={"drain_seconds": 0.2})
    body = {"prompt": "x", "n_predict": 400}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body) as reply:
        server.signal(signal.SIGINT)
        last = json.loads(list(reply.iter_lines())[-1])
    assert last["finish_reason"] == "error"
    assert last["error"] == "the server is shutting down"
    assert server.wait() == 0
    assert not any("Traceback" in line for line in server.lines)


def test_a_second_signal_stops_at_once_unless_it_is_the_first_ones_echo(
    start_server: Callable[..., LiveServer],
) -> None:
    """mpirun passes on the Ctrl+C that the terminal has delivered already."""
    server = start_server(delay=0.02)
    body = {"prompt": "x", "n_predict": 400}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body) as reply:
        server.signal(signal.SIGINT)
        time.sleep(0.2)
        server.signal(signal.SIGINT)
        time.sleep(1.0)
        server.signal(signal.SIGINT)
        lines = [json.loads(line) for line in reply.iter_lines()]
    assert lines[-1]["error"] == "the server was stopped"
    assert len(lines) > 0.8 / 0.02 / 2  # it ran on after the echo
    assert server.wait() == 0


def test_engine_failure_ends_streams_and_process(start_server: Callable[..., LiveServer]) -> None:
    server = start_server(delay=0.02, fail_at_step=10)
    body = {"prompt": "x", "n_predict": 400}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body) as reply:
        last = json.loads(list(reply.iter_lines())[-1])
    assert last["finish_reason"] == "error" and "rank 1 is gone" in last["error"]
    assert server.wait() == 1
    assert any("Stopped: the engine failed: " in line for line in server.lines)


def test_port_taken_is_known_before_anything_else(live: LiveServer) -> None:
    port = httpx.URL(live.url).port
    with pytest.raises(ConfigError, match=rf"port {port} is taken.*--port"):
        reserve_port("0.0.0.0", port)
    second = subprocess.run(
        [sys.executable, "-m", "tests.api.service", json.dumps({"config": {"port": port}})],
        cwd=ROOT, capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert second.returncode == 2
    assert len(second.stderr.splitlines()) == 1


def test_two_servers_that_both_load_may_not_share_a_port() -> None:
    with reserve_port("127.0.0.1", 0) as sock, pytest.raises(ConfigError, match="is taken"):
        reserve_port("127.0.0.1", sock.getsockname()[1])


def test_a_port_just_given_up_can_be_used_again(start_server: Callable[..., LiveServer]) -> None:
    server = start_server()
    port = httpx.URL(server.url).port
    httpx.get(f"{server.url}/health", headers={"connection": "close"})
    server.stop()
    assert start_server(config={"port": port}).url == server.url


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match="--host"):
        reserve_port("no.such.host.invalid", 8000)


def test_clients_that_read_nothing_are_not_waited_for(
    start_server: Callable[..., LiveServer],
) -> None:
    """One kept the drain for a minute, and left a traceback. Who reads slowly is let finish."""
    # Slow enough that it still generates when the stall has lasted long enough.
    server = start_server(max_model_len=6144, delay=0.003, config={"drain_seconds": 60})
    body = {"prompt": "x", "n_predict": 6000, "ignore_eos": True, "logprobs": 20}
    text = json.dumps(body)
    head = f"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
    host, _, port = server.url.removeprefix("http://").partition(":")
    short = body | {"n_predict": 600}
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect((host, int(port)))
        silent.sendall((head + text).encode())
        server.wait_for_health(lambda health: health["num_generated_tokens"] > 2500, 60.0)
        with httpx.stream("POST", f"{server.url}/generate_stream", json=short, timeout=60) as slow:
            lines = slow.iter_lines()
            next(lines)
            server.signal(signal.SIGTERM)
            for last in lines:  # noqa: B007
                time.sleep(0.005)
        assert json.loads(last)["finish_reason"] == "length"
        assert server.wait(15.0) == 0
    assert not [line for line in server.lines if "Traceback" in line or "ERROR" in line]
    assert any("whose client reads nothing" in line for line in server.lines), server.lines

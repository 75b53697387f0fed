"""The client must not be the bottleneck: its cost per streamed event, against a library's."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.apis import APIS, Prompt
from benchmarks.http_client import HttpClient
from benchmarks.load import Sender

NUM_STREAMS, NUM_EVENTS = 16, 300


@pytest.fixture
def url():
    """A made-up server in a process of its own."""
    server = Path(__file__).with_name("fake_server.py")
    process = subprocess.Popen(
        [sys.executable, str(server), "--port", "0", "--token_delay", "0.001"],
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait()


async def cpu_of_ours(url: str) -> float:
    sender = Sender(APIS["completions"], lambda on_body: HttpClient(url, on_body=on_body), "m", {})
    start = time.process_time()
    replies = await asyncio.gather(
        *(sender.send(Prompt("x", NUM_EVENTS, 2)) for _ in range(NUM_STREAMS))
    )
    used = time.process_time() - start
    assert all(len(reply.token_times) == NUM_EVENTS for reply in replies), replies[0]
    return used


async def cpu_of_httpx(url: str) -> float:
    async def stream(client):
        times = []
        body = {"prompt": "x", "max_tokens": NUM_EVENTS, "stream": True}
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    if choices and choices[0]["text"]:
                        times.append(time.perf_counter())
        assert len(times) == NUM_EVENTS

    async with httpx.AsyncClient(timeout=None) as client:
        start = time.process_time()
        await asyncio.gather(*(stream(client) for _ in range(NUM_STREAMS)))
        return time.process_time() - start


def test_an_event_costs_less_than_with_a_library(url):
    ours = min(asyncio.run(cpu_of_ours(url)) for _ in range(2))
    library = min(asyncio.run(cpu_of_httpx(url)) for _ in range(2))
    events = NUM_STREAMS * NUM_EVENTS
    print(f"{ours / events * 1e6:.1f} us per event, httpx {library / events * 1e6:.1f} us")
    assert ours < library
    assert ours / events < 500e-6

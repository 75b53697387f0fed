"""A running server: load, leaving clients, idleness, and the same answers under every launcher."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable

import httpx
import pytest

from tests.live.launch import Launch, cpu_seconds, torchrun

pytestmark = pytest.mark.live

PROMPTS = {"a": 12, "The quick brown fox jumps over the lazy dog. ": 40, "0123456789" * 30: 25}
IDLE_SECONDS = 5.0
MOST_IDLE_SHARE = 0.03


def test_64_streams_of_mixed_lengths_each_have_their_own(server: Launch) -> None:
    """8 at a time, none is lost or cut, and every KV block comes back."""

    async def stream(http: httpx.AsyncClient, index: int) -> None:
        n_predict = 1 + index * 7 % 37
        body = {"prompt": f"{index} " * (1 + index * 5 % 60), "n_predict": n_predict}
        body["ignore_eos"] = True
        async with http.stream("POST", "/generate_stream/", json=body) as reply:
            lines = [json.loads(line) async for line in reply.aiter_lines()]
        assert [line["index"] for line in lines] == list(range(n_predict + 1))
        assert {line["finish_reason"] for line in lines[:-1]} == {None}
        assert lines[-1]["finish_reason"] == "length"

    async def go() -> None:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as http:
            await asyncio.gather(*(stream(http, index) for index in range(64)))

    before = server.health()["num_finished"]["length"]
    asyncio.run(go())
    server.wait_idle()
    assert server.health()["num_finished"]["length"] == before + 64


def test_a_client_that_leaves_frees_its_blocks_and_disturbs_nobody(server: Launch) -> None:
    prompt, n_predict = "Who goes there? ", 30
    expected = server.generate(prompt, n_predict)
    with server.stream("neighbour " * 5, 60) as neighbour:
        next(neighbour)
        for _ in range(3):
            with server.stream("leaving " * 40, 1500) as lines:
                for _ in range(3):
                    next(lines)
                assert server.health()["num_held_blocks"] > 20
        assert server.generate(prompt, n_predict) == expected
        *_, last = neighbour
        assert last["index"] == 60 and last["finish_reason"] == "length"
    server.wait_idle(5.0)
    assert server.generate(prompt, n_predict) == expected


def test_an_idle_server_rests(server: Launch) -> None:
    """Under 3 % of a core per rank. CPU time, so other load does not matter."""
    server.generate("warm", 4)
    server.wait_idle()
    time.sleep(0.5)
    pids = server.rank_pids()
    assert len(pids) == 2
    before = [cpu_seconds(pid) for pid in pids]
    started = time.monotonic()
    time.sleep(IDLE_SECONDS)
    elapsed = time.monotonic() - started
    shares = [(cpu_seconds(pid) - was) / elapsed for pid, was in zip(pids, before, strict=True)]
    assert max(shares) < MOST_IDLE_SHARE, shares


@pytest.mark.parametrize("launcher", ["torchrun", "single"])
def test_other_launchers_give_the_same_answers(
    launcher: str, server: Launch, start: Callable[..., Launch], model_flags: list[str]
) -> None:
    other = start(torchrun(2) if launcher == "torchrun" else [sys.executable], *model_flags)
    other.wait_ready()
    assert len(other.rank_pids()) == (2 if launcher == "torchrun" else 1)
    for prompt, n_predict in PROMPTS.items():
        assert other.generate(prompt, n_predict) == server.generate(prompt, n_predict)
    other.process.send_signal(signal.SIGTERM)
    code = other.wait(30.0)
    if launcher == "single":  # torchrun itself fails when it is ended
        assert code == 0, other.log
        assert "Traceback" not in other.log

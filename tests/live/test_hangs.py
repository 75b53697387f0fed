"""Ranks that are stopped, killed or hang under a crowd of streams: everyone is told, all ends."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live.launch import Launch, mpirun, torchrun

pytestmark = pytest.mark.live

FAULTY = str(Path(__file__).with_name("faulty_serving.py"))
NUM_STREAMS = 12
STEP_TIMEOUT = 5
MARGIN = 5.0
MOST_SECONDS = {signal.SIGSTOP: STEP_TIMEOUT + MARGIN, signal.SIGKILL: MARGIN}
FLAGS = ("--step-timeout", str(STEP_TIMEOUT), "--max-num-seqs", str(NUM_STREAMS))


def read_end(server: Launch, number: int) -> tuple[str, float]:
    """How a stream ends, "cut" or the error of its last line or event, and when."""
    prompt = {"prompt": f"stream {number}"}
    if number % 2:
        path, body = "/generate_stream", {"n_predict": 1900, "ignore_eos": True}
    else:
        path, body = "/v1/completions", {"max_tokens": 1900, "stream": True, "ignore_eos": True}
    lines = [""]
    try:
        with httpx.stream("POST", server.url + path, json=prompt | body, timeout=120) as reply:
            lines += (line for line in reply.iter_lines() if line)
    except httpx.TransportError as error:
        return f"cut: {error}", time.monotonic()
    objects = [json.loads(line.removeprefix("data: ")) for line in lines[-2:] if line[-1:] == "}"]
    error = objects[-1].get("error") if objects else None
    message = error["message"] if isinstance(error, dict) else error
    return message or f"ended with {lines[-2:]}", time.monotonic()


def all_stream(health: dict[str, Any]) -> bool:
    """Whether all have begun, and some tokens have come."""
    has_tokens: bool = health["num_generated_tokens"] > 5 * NUM_STREAMS
    return has_tokens and health["num_running"] == NUM_STREAMS


def strike(server: Launch, fault: Callable[[], None]) -> tuple[list[str], float]:
    """Have it happen under 12 streams; how they ended, and the seconds until the last had."""
    assert not shared_memory(server), "what has a name stays when a rank is killed"
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        ends = [pool.submit(read_end, server, number) for number in range(NUM_STREAMS)]
        server.wait_for(lambda: all_stream(server.health()))
        struck = time.monotonic()
        fault()
        results = [end.result(60.0) for end in ends]
    return [message for message, _ in results], max(moment for _, moment in results) - struck


def shared_memory(server: Launch) -> set[str]:
    """Files in /dev/shm that the ranks have mapped and that still have a name."""
    lines = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in server.rank_pids())
    names = {line.split(maxsplit=5)[-1] for line in lines.splitlines() if "/dev/shm/" in line}
    return {name for name in names if Path(name).exists()}


def send(server: Launch, rank: int, number: int) -> Callable[[], None]:
    return lambda: os.kill(server.rank_pids()[rank], number)


def check_end(server: Launch, launcher: Callable[[int], list[str]], number: int) -> None:
    """The launcher ends in failure; torchrun 30 s after the ranks, whom it need not tell."""
    if launcher is torchrun and number == signal.SIGKILL:
        server.wait_for(lambda: not server.rank_pids(), 10.0)
    assert server.wait(60.0 if launcher is torchrun else MARGIN) != 0


@pytest.mark.parametrize(
    ("number", "launcher"),
    [(signal.SIGSTOP, mpirun), (signal.SIGKILL, mpirun), (signal.SIGKILL, torchrun)],
)
def test_every_client_hears_of_a_rank_that_is_stopped_or_killed(
    number: int,
    launcher: Callable[[int], list[str]],
    start: Callable[..., Launch],
    model_flags: list[str],
) -> None:
    server = start(launcher(2), *model_flags, *FLAGS, program=(FAULTY, "linger")).wait_ready()
    messages, seconds = strike(server, send(server, 1, number))
    expected = "has not answered" if number == signal.SIGSTOP else "has died"
    assert all(f"rank 1 {expected}" in message for message in messages), messages
    assert seconds < MOST_SECONDS[number]
    check_end(server, launcher, number)
    assert f"rank 1 {expected}" in server.log
    verb = "is stopped" if number == signal.SIGSTOP else "was ended"
    assert re.search(rf"rank 1 {verb} by signal {number:d} \({number.name}\)", server.log)
    assert "Traceback" not in server.log.partition("torch/distributed/elastic")[0]


@pytest.mark.parametrize("launcher", [mpirun, torchrun])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_all_connections_end_with_rank_0(
    number: int,
    launcher: Callable[[int], list[str]],
    start: Callable[..., Launch],
    model_flags: list[str],
) -> None:
    server = start(launcher(2), *model_flags, *FLAGS, program=(FAULTY, "linger")).wait_ready()
    _, seconds = strike(server, send(server, 0, number))
    assert seconds < MOST_SECONDS[number]
    check_end(server, launcher, number)
    assert re.search(rf"rank 0 \w+ \w+ by signal {number:d} \({number.name}\)", server.log)


def test_a_rank_that_hangs_in_a_step_is_named(
    start: Callable[..., Launch], model_flags: list[str]
) -> None:
    """Its heart beats, its step does not end."""
    server = start(mpirun(2), *model_flags, *FLAGS, program=(FAULTY, "hang")).wait_ready()
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(read_end, server, 1)
        message, _ = end.result(60.0)
    assert re.search(r"step \d+ has not ended within 5 s: rank 1 has not reported", message)
    assert server.wait(MARGIN) != 0
    assert "rank 1 has not reported" in server.log


def test_a_second_ctrl_c_ends_streams_with_a_word(
    start: Callable[..., Launch], model_flags: list[str]
) -> None:
    server = start(mpirun(2), *model_flags, *FLAGS, program=(FAULTY, "linger")).wait_ready()

    def interrupt_twice() -> None:
        server.interrupt()
        server.wait_for(lambda: server.health()["status"] == "draining", 5.0)
        time.sleep(1.5)
        server.interrupt()

    messages, seconds = strike(server, interrupt_twice)
    assert not [message for message in messages if message.startswith(("cut", "ended"))], messages
    assert seconds < 5.0
    server.wait(MARGIN)  # mpirun's exit code is 0 where a rank's end overtakes its own clean-up
    assert "Traceback" not in server.log

"""A server that starts its ranks itself: streams outlive them, it ends with a word, or whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.live.launch import CACHE_FLAGS, ROOT, Launch
from tests.live.recovery import HEAD, count_equal, rank_pids, read_all, strike

pytestmark = pytest.mark.live

FAULTY = (str(Path(__file__).with_name("faulty_serving.py")),)
NUM_STREAMS = 5
NUM_TOKENS = 120


def test_streams_outlive_ranks_that_are_killed_or_stopped(
    start: Callable[..., Launch], model_flags: list[str]
) -> None:
    flags = ["--tensor-parallel-size", "2", "--step-timeout", "5"]
    program = (*FAULTY, "linger")
    server = start(HEAD, *model_flags, *flags, program=program).wait_ready()
    expected = read_all(server, NUM_STREAMS, NUM_TOKENS)
    for rank, number in ((1, signal.SIGKILL), (0, signal.SIGSTOP)):
        streams, _ = strike(server, rank, number, NUM_STREAMS, NUM_TOKENS)
        assert count_equal(expected, streams) == NUM_STREAMS, (expected, streams, server.log)
    assert server.health()["num_restarts"] == 2
    assert "rank 1 has died: the ranks are started anew (1 of at most 5 times)" in server.log
    assert "rank 0 has not answered for 4 s" in server.log
    assert len(rank_pids(server)) == 2
    os.kill(server.process.pid, signal.SIGKILL)
    assert server.wait(10.0) != 0  # and nothing is left behind


def test_one_groups_death_costs_its_streams_a_replay_on_the_other(
    start: Callable[..., Launch],
) -> None:
    flags = ["--model", str(ROOT / "demo_model"), "--low-bit", "bf16", "--dtype", "float32"]
    flags += [*CACHE_FLAGS, "--max-model-len", "512", "--max-num-seqs", "12"]
    flags += ["--data-parallel-size", "2"]
    server = start(HEAD, *flags).wait_ready()
    expected = read_all(server, 12, NUM_TOKENS)
    streams, _ = strike(server, 1, signal.SIGKILL, 12, NUM_TOKENS)
    assert count_equal(expected, streams) == 12, (expected, streams, server.log)
    server.wait_for(lambda: server.health()["status"] == "ok", 120.0)
    num_restarts = [group["num_restarts"] for group in server.health()["groups"]]
    assert num_restarts == [0, 1]
    assert "group 1: rank 0 has died: the ranks are started anew (1 of at most 5" in server.log


def test_one_rank_drains_at_sigterm_and_ends_with_its_head(
    start: Callable[..., Launch], model_flags: list[str]
) -> None:
    server = start(HEAD, *model_flags, "--tensor-parallel-size", "1").wait_ready()
    with server.stream("a stream", 300) as lines:
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.health()["status"] == "draining", 5.0)
        assert list(lines)[-1]["finish_reason"] == "length"
    assert server.wait(20.0) == 0, server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("fault", "code", "expected"),
    [
        ("load", 1, "have ended 2 times in a row, and are not started anew more than 1 times"),
        ("refuse", 2, "rank 1 has no such card: start fewer ranks"),
    ],
)
def test_a_head_whose_ranks_cannot_run_ends_with_a_line_and_a_code(
    fault: str, code: int, expected: str, start: Callable[..., Launch], model_flags: list[str]
) -> None:
    flags = ["--tensor-parallel-size", "2", "--max-restarts", "1"]
    server = start(HEAD, *model_flags, *flags, program=(*FAULTY, fault))
    assert server.wait(120.0) == code
    (line,) = server.errors
    assert line.startswith("serving.py: error:") and expected in line

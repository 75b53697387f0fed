"""The process that stands in for a rank before its launcher, with a program for a rank."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from autotp_serving.distributed.launch import find_launched_rank
from autotp_serving.distributed.stand_in import LAST_WORDS_SECONDS

ROOT = Path(__file__).parents[1]
RANK = """
import os, signal, sys, time
from autotp_serving.distributed.stand_in import part_from_launcher
stand_in = part_from_launcher(3)
{body}
print(os.getpid(), flush=True)
time.sleep(60)
"""

Start = Callable[..., tuple[subprocess.Popen[str], int]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts such a program; returns what its launcher knows, and the rank's own process."""
    pids: list[int] = []

    def start_one(body: str = "") -> tuple[subprocess.Popen[str], int]:
        known = subprocess.Popen(
            [sys.executable, "-c", RANK.format(body=body)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"MARK": "of a rank"},
        )  # fmt: skip
        pids.append(known.pid)
        pids.append(int(known.stdout.readline()))
        return known, pids[-1]

    yield start_one
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_the_stand_in_is_small_and_is_not_taken_for_the_rank(start: Start) -> None:
    known, pid = start()
    assert known.pid != pid
    wait_until(lambda: b"stand_in.py" in Path(f"/proc/{known.pid}/cmdline").read_bytes())
    assert b"MARK" not in Path(f"/proc/{known.pid}/environ").read_bytes()
    assert b"MARK" in Path(f"/proc/{pid}/environ").read_bytes()
    status = Path(f"/proc/{known.pid}/status").read_text()
    assert int(status.partition("VmRSS:")[2].split()[0]) < 20_000


@pytest.mark.parametrize("code", [0, 2, 1])
def test_it_ends_with_the_ranks_own_exit_code(code: int, start: Start) -> None:
    known, _ = start(f"print(os.getpid(), flush=True); sys.exit({code})")
    assert known.wait(10) == code


def test_a_killed_rank_is_named_and_the_others_get_a_moment(start: Start) -> None:
    known, pid = start()
    killed = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert known.stdout.readline() == "WARNING:  rank 3 was ended by signal 9 (SIGKILL)\n"
    assert time.monotonic() - killed < 1.0
    assert known.wait(10) == -signal.SIGKILL
    assert time.monotonic() - killed > LAST_WORDS_SECONDS


def test_a_stopped_rank_is_named_too(start: Start) -> None:
    known, pid = start()
    os.kill(pid, signal.SIGSTOP)
    assert known.stdout.readline() == "WARNING:  rank 3 is stopped by signal 19 (SIGSTOP)\n"
    os.kill(pid, signal.SIGCONT)
    assert known.stdout.readline() == "WARNING:  rank 3 goes on\n"


def test_signals_reach_the_rank_also_when_it_is_stopped(start: Start) -> None:
    known, pid = start("signal.signal(signal.SIGTERM, lambda *_: (print('heard'), sys.exit(5)))")
    wait_until(lambda: b"stand_in.py" in Path(f"/proc/{known.pid}/cmdline").read_bytes())
    time.sleep(0.5)  # until its handlers are there
    os.kill(pid, signal.SIGSTOP)
    assert "is stopped" in known.stdout.readline()
    known.terminate()
    assert known.wait(10) == 5
    assert "heard" in known.stdout.read()


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_rank_without_its_stand_in_has_last_words_and_ends(
    is_stopped: bool, start: Start
) -> None:
    known, pid = start("stand_in.on_end = lambda: print('last words', flush=True)")
    if is_stopped:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: "T (stopped)" in Path(f"/proc/{pid}/status").read_text())
    known.kill()
    wait_until(lambda: has_ended(pid), LAST_WORDS_SECONDS + 5)
    assert "last words" in known.stdout.read()


def test_a_rank_whose_last_words_fail_ends_too(start: Start) -> None:
    known, pid = start("stand_in.on_end = lambda: 1 / 0")
    known.kill()
    wait_until(lambda: has_ended(pid), LAST_WORDS_SECONDS + 5)


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, None),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, 1),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, 3),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, 0),
        ({"WORLD_SIZE": "2"}, None),
    ],
)
def test_only_ranks_of_several_have_one(environ: dict[str, str], rank: int | None) -> None:
    assert find_launched_rank(environ) == rank

"""How a server ends: told to, or by a fault. No rank stays behind; killed ones: test_hangs.py."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.live.launch import Launch, cpu_seconds, mpirun

pytestmark = pytest.mark.live

FAULTY = str(Path(__file__).with_name("faulty_serving.py"))
NUM_STREAMS = 20
STREAM_LEN = 250


def read_until_cut(server: Launch, prompt: str, n_predict: int) -> float:
    """Read a stream that cannot end well; the moment at which its client knew."""
    last = {}
    try:
        with server.stream(prompt, n_predict) as lines:
            for last in lines:  # noqa: B007
                pass
    except httpx.TransportError:  # cut
        return time.monotonic()
    assert last["finish_reason"] == "error", last
    return time.monotonic()


def start_curl(server: Launch, prompt: str, n_predict: int) -> subprocess.Popen[str]:
    """Read a stream to its end in a process of its own."""
    body = json.dumps({"prompt": prompt, "n_predict": n_predict, "ignore_eos": True})
    command = ["curl", "-sSN", "-d", body, f"{server.url}/generate_stream"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("way", ["SIGTERM to mpirun", "Ctrl+C"])
def test_streams_finish_before_the_server_ends(
    way: str, start: Callable[..., Launch], model_flags: list[str]
) -> None:
    """A signal reaches every rank at once; the second one must live until the first has drained."""
    flags = ["--drain-seconds", "120", "--max-num-seqs", str(NUM_STREAMS)]
    server = start(mpirun(2), *model_flags, *flags, program=(FAULTY, "linger")).wait_ready()

    answers = [start_curl(server, f"stream {index}", STREAM_LEN) for index in range(NUM_STREAMS)]
    server.wait_for(lambda: server.health()["num_generated_tokens"] > 3 * NUM_STREAMS)
    assert server.health()["num_running"] == NUM_STREAMS
    if way == "Ctrl+C":
        server.interrupt()
    else:
        server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.health()["status"] == "draining", 5.0)
    refused = httpx.post(f"{server.url}/generate", json={"prompt": "late"}, timeout=30)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    for answer in answers:
        output, _ = answer.communicate(timeout=120)
        last = json.loads(output.splitlines()[-1])
        assert (last["index"], last["finish_reason"]) == (STREAM_LEN, "length")
    assert server.wait(30.0) == 0, server.log
    assert "Traceback" not in server.log


def test_ctrl_c_while_loading_ends_all_ranks(
    start: Callable[..., Launch], model_flags: list[str]
) -> None:
    """As a KeyboardInterrupt it left rank 0 waiting in MPI's exit for ever."""
    server = start(mpirun(2), *model_flags)

    def is_loading() -> bool:
        pids = server.rank_pids()
        return len(pids) == 2 and min(map(cpu_seconds, pids)) > 2.0

    server.wait_for(is_loading, 60.0)
    server.interrupt()
    assert server.wait(10.0) != 0
    assert "Traceback" not in server.log and "Uvicorn running" not in server.log


def test_a_fault_in_a_step_of_the_second_rank_ends_streams_and_group(
    start: Callable[..., Launch], model_flags: list[str]
) -> None:
    """Rank 0 waits for it inside a collective, from where nothing can wake it."""
    server = start(mpirun(2), *model_flags, program=(FAULTY, "step")).wait_ready()
    started = time.monotonic()
    assert read_until_cut(server, "stream", 1900) - started < 20.0
    assert server.wait(10.0) != 0
    assert "rank 1 failed" in server.log and "no memory left for this step" in server.log

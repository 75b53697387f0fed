"""A crowd of streaming clients of which half leave at random, and what the server keeps of them.

    python -m tests.live.crowd --connections 500 --rounds 8

starts the embedded model on two ranks and prints a line a round: how many answers were complete and
how many clients left, then, with nobody there any more, what rank 0 still holds and the memory of
both ranks. Exit code 1 if an answer is not complete, or more is held than after the first round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.live.launch import ROOT, Launch, mpirun

PROGRAM = (str(Path(__file__).with_name("counting_serving.py")),)
FLAGS = ("--model", str(ROOT / "demo_model"), "--low-bit", "bf16", "--max-num-seqs", "32",
         "--kv-cache-memory", "64MiB")  # fmt: skip
LONGEST_STAY = 4.0  # seconds after which the last of those that leave has left


@dataclass(frozen=True)
class Round:
    """What became of the clients of one round."""

    num_stayed: int
    num_complete: int
    num_left: int
    seconds: float


def run_round(url: str, num_connections: int, seed: int) -> Round:
    """Have a crowd ask at once; every other one leaves at a random moment."""

    async def ask(http: httpx.AsyncClient, number: int) -> bool:
        n_predict = 2 + number % 7
        body = {"prompt": f"What is {number}?", "n_predict": n_predict, "ignore_eos": True}
        reply = await http.post(f"{url}/generate_stream", json=body)
        lines = [json.loads(line) for line in reply.text.splitlines()]
        return len(lines) == n_predict + 1 and lines[-1]["finish_reason"] == "length"

    async def leave(http: httpx.AsyncClient, number: int, seconds: float) -> bool:
        try:
            return await asyncio.wait_for(ask(http, number), seconds)
        except asyncio.TimeoutError:
            return False

    async def go() -> list[bool]:
        rng = random.Random(seed)
        limits = httpx.Limits(max_connections=num_connections)
        async with httpx.AsyncClient(limits=limits, timeout=300) as http:
            return await asyncio.gather(
                *(leave(http, number, rng.uniform(0.0, LONGEST_STAY)) if number % 2
                  else ask(http, number) for number in range(num_connections))
            )  # fmt: skip

    started = time.monotonic()
    done = asyncio.run(go())
    return Round(
        len(done[::2]), sum(done[::2]), done[1::2].count(False), time.monotonic() - started
    )


def resident_mib(pid: int) -> float:
    """Memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def kept(server: Launch) -> dict[str, int]:
    """See counting_serving.py; asked once the connections of before are closed."""
    server.wait_idle(60)
    deadline = time.monotonic() + 10
    before: dict[str, int] = {}
    while time.monotonic() < deadline:
        now = httpx.get(f"{server.url}/kept", timeout=60).json()
        if now == before:
            break
        before = now
        time.sleep(0.3)
    return now


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Launch(mpirun(2), Path(folder) / "log", *FLAGS, program=PROGRAM)
        try:
            server.wait_ready()
            return report(server, options.connections, options.rounds)
        finally:
            server.clean_up()


def report(server: Launch, num_connections: int, num_rounds: int) -> int:
    """Print the rounds; the exit code."""
    ranks = server.rank_pids()
    first: dict[str, int] = {}
    is_right = True
    print("round  complete  left  seconds  " + "  ".join(kept(server)) + "  rank 0, 1 MiB")
    for number in range(num_rounds):
        one = run_round(server.url, num_connections, number)
        now = kept(server)
        first = first or now
        memory = ", ".join(f"{resident_mib(pid):.1f}" for pid in ranks)
        cells = "  ".join(f"{value:>{len(name)}}" for name, value in now.items())
        print(
            f"{number:5}  {one.num_complete:3}/{one.num_stayed:3}  {one.num_left:5} "
            f"{one.seconds:7.1f}  {cells}  {memory}",
            flush=True,
        )
        is_right &= one.num_complete == one.num_stayed
        is_right &= all(now[name] <= first[name] for name in now if name != "objects")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())

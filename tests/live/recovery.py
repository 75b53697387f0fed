"""Ranks that are killed or stopped under streams, and how long these stand still.

    python -m tests.live.recovery --kills 10

starts the embedded model on two ranks, has 20 streams of all kinds answered undisturbed, then again
and again while each rank in turn is ended by SIGKILL or stopped by SIGSTOP. It prints a line a
kill: the rank, the signal, the seconds from there to the next token, and the machine's load by
then. Exit code 1 if a stream is not complete, or not equal to the undisturbed one in text, tokens,
logprobs and end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from autotp_serving.head.rank_side import HEAD_NAME
from tests.live.launch import ROOT, Launch

HEAD = [sys.executable]
NUM_STREAMS = 20
STEP_TIMEOUT = 5
MAX_ERROR = 1e-3
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1, "seed": 11, "top_p": 0.9, "logprobs": 3},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 0.9, "frequency_penalty": 0.7, "repetition_penalty": 1.1, "logprobs": 1},
    {"temperature": 0.7, "guided_regex": "([a-z]{2,9} ){40}"},
)
"""What the streams ask for, in turns; each has a seed."""


@dataclass
class Stream:
    """What a client saw: all pieces joined, and when each came."""

    text: str = ""
    logprobs: list[tuple[str, float]] = field(default_factory=list)
    end: str | None = None
    times: list[float] = field(default_factory=list)

    def equals(self, other: Stream) -> bool:
        """Whether all is the same that must not depend on what becomes of the ranks.

        Tokens that run again run many at once, so a logprob may differ in its last bits.
        """
        pairs = list(zip(self.logprobs, other.logprobs, strict=False))
        return (
            (self.text, self.end, len(self.logprobs))
            == (other.text, other.end, len(other.logprobs))
            and all(one == two for (one, _), (two, _) in pairs)
            and all(abs(one - two) < MAX_ERROR for (_, one), (_, two) in pairs)
        )


def read_stream(server: Launch, number: int, num_tokens: int) -> Stream:
    """One completion, as it streams; its end is the error where there is one."""
    body = {"prompt": f"What is {number}?", "max_tokens": num_tokens, "stream": True}
    # Without a seed a draw depends on how many requests came before.
    kind = KINDS[number % len(KINDS)]
    body |= {"ignore_eos": "guided_regex" not in kind, "seed": number} | kind
    stream = Stream()
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            stream.times.append(time.monotonic())
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                stream.end = event["error"]["message"]
                continue
            for choice in event["choices"]:
                stream.text += choice["text"]
                stream.end = choice["finish_reason"] or stream.end
                found = choice["logprobs"] or {"tokens": [], "token_logprobs": []}
                pairs = zip(found["tokens"], found["token_logprobs"], strict=True)
                stream.logprobs += pairs
    return stream


def read_all(server: Launch, num_streams: int, num_tokens: int) -> list[Stream]:
    """All streams at once."""
    with ThreadPoolExecutor(num_streams) as pool:
        futures = [pool.submit(read_stream, server, n, num_tokens) for n in range(num_streams)]
        return [future.result() for future in futures]


def rank_pids(server: Launch) -> list[int]:
    """The processes of the ranks, group by group in rank order; the head is none of them."""
    ranks = {}
    for pid, environ in server.processes().items():
        _, _, num_ranks, _, *group = environ.get(HEAD_NAME, "- - - -").split()
        if {"PMI_RANK", "RANK"} & set(environ) or num_ranks == "1":  # that one has no launcher
            rank = int(environ.get("PMI_RANK", environ.get("RANK", "0")))
            ranks["".join(group), rank] = pid
    return [ranks[rank] for rank in sorted(ranks)]


def strike(
    server: Launch, rank: int, number: int, num_streams: int, num_tokens: int
) -> tuple[list[Stream], float]:
    """Have a rank struck under the streams; these, and the seconds until the first went on."""
    struck = 0.0

    def wait_and_kill() -> None:
        nonlocal struck
        before = server.health()["num_generated_tokens"]
        goal = before + num_streams * num_tokens // 4
        server.wait_for(lambda: server.health()["num_generated_tokens"] > goal, 120.0)
        struck = time.monotonic()
        os.kill(rank_pids(server)[rank], number)

    killer = threading.Thread(target=wait_and_kill)
    killer.start()
    streams = read_all(server, num_streams, num_tokens)
    killer.join()
    times = sorted(moment for stream in streams for moment in stream.times if moment > struck)
    gaps = [(after - before, after) for before, after in pairwise(times)]
    return streams, max(gaps)[1] - struck


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--streams", type=int, default=NUM_STREAMS)
    parser.add_argument("--tokens", type=int, default=300)
    options = parser.parse_args()
    flags = ["--tensor-parallel-size", "2", "--model", str(ROOT / "demo_model")]
    flags += ["--low-bit", "bf16", "--kv-cache-memory", "64MiB"]
    flags += ["--max-num-seqs", str(options.streams), "--step-timeout", str(STEP_TIMEOUT)]
    flags += ["--max-restarts", str(2 * options.kills)]
    with tempfile.TemporaryDirectory() as folder:
        server = Launch(HEAD, Path(folder) / "log", *flags)
        try:
            server.wait_ready()
            return report(server, options.kills, options.streams, options.tokens)
        finally:
            server.clean_up()


def report(server: Launch, num_kills: int, num_streams: int, num_tokens: int) -> int:
    """Print the kills; the exit code."""
    expected = read_all(server, num_streams, num_tokens)
    is_right = True
    seconds: dict[str, list[float]] = {}
    print("kill  rank  signal   equal  seconds to go on  load")
    for number in range(num_kills):
        rank, sign = number % 2, (signal.SIGKILL, signal.SIGSTOP)[number // 2 % 2]
        streams, to_go_on = strike(server, rank, sign, num_streams, num_tokens)
        num_equal = count_equal(expected, streams)
        seconds.setdefault(sign.name, []).append(to_go_on)
        print(
            f"{number:4}  {rank:4}  {sign.name}  {num_equal:2}/{num_streams}  {to_go_on:16.1f}"
            f"  {os.getloadavg()[0]:4.0f}",
            flush=True,
        )
        is_right &= num_equal == num_streams
    is_right &= server.health()["num_restarts"] >= num_kills  # a busy machine may add some
    for name, values in seconds.items():
        print(f"{name}: median {statistics.median(values):.1f} s, most {max(values):.1f} s")
    return 0 if is_right else 1


def count_equal(expected: Sequence[Stream], streams: Sequence[Stream]) -> int:
    """Streams that are complete and what they were without a fault."""
    pairs = zip(expected, streams, strict=True)
    return sum(one.equals(two) and one.end in ("stop", "length") for one, two in pairs)


if __name__ == "__main__":
    sys.exit(main())

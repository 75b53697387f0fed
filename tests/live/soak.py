"""Half an hour of clients that leave, of structured output and of preemption: what stays behind.

    python -m tests.live.soak --minutes 30

starts the embedded model on two ranks with a KV cache too small for all that run, and prints a line
a minute: answers, clients that left, preemptions, and the memory of each rank with its children.
At the end everybody is gone, and what rank 0 holds is compared with before.

The verdict, and exit code 1 if it is not met: every answer was whole and in its form, sequences
were preempted, no rank grew by more than 30 MiB after the fifth minute (after half of a shorter
run), and no stream, sequence, block or file is left.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.live.crowd import PROGRAM, kept
from tests.live.launch import ROOT, Launch, mpirun
from tests.live.trees import tree_mib

# The cache holds 1,365 tokens: one sequence of the full length, and a third of what 16 clients ask.
FLAGS = ("--model", str(ROOT / "demo_model"), "--low-bit", "bf16", "--max-num-seqs", "16",
         "--max-model-len", "1024", "--max-num-batched-tokens", "512",
         "--kv-cache-memory", "4MiB")  # fmt: skip
NUM_CLIENTS = 16
SETTLE_MINUTES = 5.0
MAX_GROWTH_MIB = 30.0
SAMPLE_SECONDS = 5.0
MAX_TRIES = 10
EMPTY = ("streams", "sequences", "blocks")


@dataclass
class Tally:
    """What became of the requests, and the memory of the ranks over time."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    samples: list[tuple[float, tuple[float, ...]]] = field(default_factory=list)


def make_schema(rng: random.Random) -> dict[str, Any]:
    """A schema that has hardly been asked for before, so that no cache of grammars is spared."""
    words = rng.sample(["red", "green", "blue", "dog", "cat", "yes", "no"], rng.randint(2, 5))
    return {
        "type": "object",
        "properties": {
            "kind": {"enum": words},
            "count": {"type": "integer", "minimum": 0, "maximum": rng.randint(1, 10**6)},
            "tags": {"type": "array", "items": {"enum": words}, "maxItems": rng.randint(1, 4)},
        },
        "required": ["kind", "count"],
        "additionalProperties": False,
    }


async def stay(http: httpx.AsyncClient, rng: random.Random) -> None:
    """Read a stream to its end: every token must come."""
    n_predict = rng.randint(20, 300)
    body = {"prompt": f"Define {rng.random()}. " * rng.randint(1, 8), "n_predict": n_predict,
            "temperature": rng.choice([0.0, 1.0]), "ignore_eos": True}  # fmt: skip
    reply = await http.post("/generate_stream", json=body)
    assert reply.status_code == 200, reply.text[:200]
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert len(lines) == n_predict + 1, f"{len(lines)} lines of {n_predict + 1}"
    assert lines[-1]["finish_reason"] == "length", lines[-1]


async def leave(http: httpx.AsyncClient, rng: random.Random) -> None:
    """Go away at a random moment: before the first token, or among them."""
    body = {"prompt": f"What is {rng.random()}?", "n_predict": 400, "ignore_eos": True}

    async def read() -> None:
        async with http.stream("POST", "/generate_stream", json=body) as reply:
            async for _ in reply.aiter_lines():
                pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), rng.choice([0.01, 0.1, 1.0, 3.0]) * rng.random())


async def fill_schema(http: httpx.AsyncClient, rng: random.Random) -> None:
    """An answer in the form of a schema."""
    schema = make_schema(rng)
    body = {
        "messages": [{"role": "user", "content": "What is a dog?"}],
        "max_tokens": 200, "temperature": 1.0, "stream": False,
        "response_format": {"type": "json_schema",
                            "json_schema": {"name": "answer", "schema": schema}},
    }  # fmt: skip
    choice = await _choose(http, "/v1/chat/completions", body)
    if choice["finish_reason"] == "stop":
        answer = json.loads(choice["message"]["content"])
        assert answer["kind"] in schema["properties"]["kind"]["enum"], answer
        assert 0 <= answer["count"] <= schema["properties"]["count"]["maximum"], answer


async def match_regex(http: httpx.AsyncClient, rng: random.Random) -> None:
    """An answer in the form of a regular expression."""
    pattern = f"[a-f]{{{rng.randint(1, 40)}}}-[0-9]{{1,{rng.randint(1, 9)}}}"
    body = {"prompt": "A code: ", "max_tokens": 100, "temperature": 1.0, "guided_regex": pattern}
    choice = await _choose(http, "/v1/completions", body)
    if choice["finish_reason"] == "stop":
        assert re.fullmatch(pattern, choice["text"]), (pattern, choice["text"])


async def be_refused(http: httpx.AsyncClient, rng: random.Random) -> None:
    """A grammar that cannot be."""
    body = {"prompt": "x", "guided_regex": "(" * rng.randint(1, 50)}
    reply = await http.post("/v1/completions", json=body)
    assert reply.status_code == 400, reply.text[:200]


async def _choose(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer; asked for again, as clients do, where no processor is free to try the form."""
    for _ in range(MAX_TRIES):
        reply = await http.post(path, json=body)
        if reply.status_code != 503 or reply.json()["error"]["code"] != "busy":
            break
        await asyncio.sleep(float(reply.headers["retry-after"]))
    assert reply.status_code == 200, reply.text[:200]
    return reply.json()["choices"][0]


KINDS = (stay, stay, stay, leave, leave, leave, fill_schema, fill_schema, match_regex, be_refused)


async def run_client(url: str, number: int, until: float, tally: Tally) -> None:
    """One request after the other, each of a kind drawn at random."""
    rng = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        while time.monotonic() < until:
            kind = rng.choice(KINDS)
            try:
                await kind(http, rng)
            except (AssertionError, httpx.HTTPError, ValueError, KeyError) as error:
                tally.counts["failed"] += 1
                tally.failures.append(f"{kind.__name__}: {type(error).__name__}: {error}"[:300])
            else:
                tally.counts[kind.__name__] += 1


async def watch(server: Launch, ranks: list[int], until: float, tally: Tally) -> None:
    """Note the memory every few seconds and print a line a minute."""
    started = time.monotonic()
    print("minute  answers  left  in a form  refused  failed  preempted  rank 0, 1 MiB", flush=True)
    minute = 1
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        while (now := time.monotonic()) < until:
            await asyncio.sleep(min(SAMPLE_SECONDS, until - now))
            elapsed = time.monotonic() - started
            tally.samples.append((elapsed, tuple(tree_mib(pid) for pid in ranks)))
            if elapsed >= 60 * minute or time.monotonic() >= until:
                health = (await http.get("/health")).json()
                counts = tally.counts
                in_form = counts["fill_schema"] + counts["match_regex"]
                memory = ", ".join(f"{mib:.1f}" for mib in tally.samples[-1][1])
                print(
                    f"{elapsed / 60:6.1f}  {counts['stay']:7}  {counts['leave']:4}  {in_form:9}  "
                    f"{counts['be_refused']:7}  {counts['failed']:6}  "
                    f"{health['num_preemptions']:9}  {memory}",
                    flush=True,
                )
                minute += 1


async def soak(server: Launch, ranks: list[int], seconds: float, num_clients: int) -> Tally:
    """Have the clients at it for so long."""
    tally = Tally()
    until = time.monotonic() + seconds
    await asyncio.gather(
        watch(server, ranks, until, tally),
        *(run_client(server.url, number, until, tally) for number in range(num_clients)),
    )
    return tally


def find_growth(tally: Tally, settle_seconds: float) -> list[float]:
    """By how many MiB each rank rose above what it had when it had settled."""
    later = [memory for elapsed, memory in tally.samples if elapsed >= settle_seconds]
    settled, *rest = later
    return [
        max((memory[rank] for memory in rest), default=settled[rank]) - settled[rank]
        for rank in range(len(settled))
    ]


def warm_up(server: Launch) -> None:
    """One request of each kind: what is opened or started once is there afterwards."""

    async def go() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=300) as http:
            for kind in dict.fromkeys(KINDS):
                await kind(http, random.Random(0))

    asyncio.run(go())


def report(server: Launch, minutes: float, num_clients: int) -> int:
    """Soak, judge and print; the exit code."""
    ranks = server.rank_pids()
    warm_up(server)
    before = kept(server)
    seconds = 60 * minutes
    settle = min(60 * SETTLE_MINUTES, seconds / 2)
    tally = asyncio.run(soak(server, ranks, seconds, num_clients))
    after = kept(server)
    num_preemptions = server.health()["num_preemptions"]
    growth = find_growth(tally, settle)
    for line in tally.failures[:10]:
        print(f"failed: {line}")
    checks = {
        f"every answer was whole and in its form ({tally.counts['failed']} were not)":
            not tally.counts["failed"],
        f"sequences were preempted ({num_preemptions})": num_preemptions > 0,
        f"no rank grew over {MAX_GROWTH_MIB:.0f} MiB after minute {settle / 60:g} "
        f"({', '.join(f'{mib:+.1f}' for mib in growth)})": max(growth) <= MAX_GROWTH_MIB,
        f"no stream, sequence or block is left ({[after[name] for name in EMPTY]})":
            not any(after[name] for name in EMPTY),
        f"files are as before ({before['files']}, now {after['files']})":
            after["files"] <= before["files"],
        f"tasks are as before ({before['tasks']}, now {after['tasks']})":
            after["tasks"] <= before["tasks"],
        "no traceback in the log": "Traceback" not in server.log,
    }  # fmt: skip
    for text, is_met in checks.items():
        print(f"{'ok ' if is_met else 'NOT'} {text}")
    is_right = all(checks.values())
    print(f"verdict: {'passed' if is_right else 'FAILED'}, {minutes:g} minutes", flush=True)
    return 0 if is_right else 1


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=NUM_CLIENTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Launch(mpirun(2), Path(folder) / "log", *FLAGS, program=PROGRAM)
        try:
            server.wait_ready()
            return report(server, options.minutes, options.clients)
        finally:
            server.clean_up()


if __name__ == "__main__":
    sys.exit(main())

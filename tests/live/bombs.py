"""What a stream loses while bombs go off beside it: nasty schemas, templates, bodies, in a loop.

    python -m tests.live.bombs --seconds 60

starts the embedded model, its chat template made nasty, on two ranks. In each of three rounds one
ordinary stream runs for `--seconds` beside all bombs of bomb_bodies.py, which a client of lowest
priority sends over and over, four at a time, and alone before and after that; `/health` is asked
all the while. Printed are, for each bomb, how often it was answered, with what and after how long,
and for each round the stream's pace, the slowest probe and the memory of each rank with its
children.

The verdict, and exit code 1 if it is not met: the stream loses at most 25 % of its pace (median of
the rounds), no probe takes over a second, memory ends within 100 MiB of its start, every bomb is
answered, none of them by 500, and the server is still there. `--only` and `--without` choose bombs
by parts of their names.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.live.bomb_bodies import NASTY_TEMPLATE, list_bombs
from tests.live.launch import ROOT, Launch, mpirun
from tests.live.trees import tree_mib

FLAGS = ("--low-bit", "bf16", "--max-num-seqs", "16", "--kv-cache-memory", "64MiB")
STREAM_LEN = 400  # tokens of one stream; the next one follows it at once
PROBE_SECONDS = 0.1
MAX_LOSS = 0.25
MAX_PROBE_SECONDS = 1.0
MAX_GROWTH_MIB = 100.0
NUM_BOMBERS = 4
ANSWER_SECONDS = 60.0  # after which a bomb counts as not answered
REST_SECONDS = 5.0  # before memory is compared


@dataclass
class Answers:
    """What came back for one bomb."""

    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    slowest: float = 0.0


def make_model(folder: Path) -> Path:
    """The embedded model with a chat template that does what a request asks it to."""
    shutil.copytree(ROOT / "demo_model", folder, ignore=shutil.ignore_patterns("training"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = NASTY_TEMPLATE + settings["chat_template"]
    path.write_text(json.dumps(settings))
    return folder


def choose(only: list[str], without: list[str]) -> list[str]:
    """Names of the bombs that were asked for."""
    return [
        name
        for name in list_bombs()
        if (not only or any(part in name for part in only))
        and not any(part in name for part in without)
    ]


def new_client(url: str) -> httpx.AsyncClient:
    """A client for one request, which by default would spend 20 ms on certificates first."""
    return httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, verify=False)


# The client of the bombs, a process of its own.


async def send_bombs(url: str, names: list[str], seconds: float) -> dict[str, Answers]:
    """Send all bombs, over and over, until the time is up."""
    bombs = list_bombs()
    answers = {name: Answers() for name in names}
    until = time.monotonic() + seconds
    numbers = iter(range(sys.maxsize))

    async def send() -> None:
        while time.monotonic() < until:
            name = names[next(numbers) % len(names)]
            path, body = bombs[name]()
            started = time.monotonic()
            try:
                async with new_client(url) as http:
                    reply = await http.post(
                        path, content=body, headers={"content-type": "application/json"}
                    )
                status = str(reply.status_code)
            except httpx.HTTPError as error:
                status = type(error).__name__
            answers[name].statuses[status] += 1
            answers[name].slowest = max(answers[name].slowest, time.monotonic() - started)

    await asyncio.gather(*(send() for _ in range(NUM_BOMBERS)))
    return answers


def run_bomber(url: str, names: list[str], seconds: float) -> None:
    """Send at lowest priority and print what came back."""
    os.nice(19)
    # Where Linux shares the cores among sessions first, that counts within a session only.
    os.setsid()
    with contextlib.suppress(OSError):  # there are none
        Path("/proc/self/autogroup").write_text("19")
    answers = asyncio.run(send_bombs(url, names, seconds))
    print(json.dumps({name: [one.statuses, one.slowest] for name, one in answers.items()}))


# What is measured beside it.


@dataclass
class Measured:
    """The ordinary client's side of a while."""

    pace: float
    slowest_probe: float


async def measure(url: str, seconds: float) -> Measured:
    """One stream after the other, and probes."""
    num_tokens = 0
    slowest = 0.0

    async def stream(http: httpx.AsyncClient) -> None:
        nonlocal num_tokens
        body = {"prompt": "Define dog.", "n_predict": STREAM_LEN, "ignore_eos": True}
        while True:
            async with http.stream("POST", "/generate_stream", json=body) as reply:
                assert reply.status_code == 200, reply.status_code
                async for line in reply.aiter_lines():
                    last = json.loads(line)
                    num_tokens += last["finish_reason"] is None
                assert last["finish_reason"] == "length", last

    async def probe() -> None:
        nonlocal slowest
        while True:
            started = time.monotonic()
            try:
                async with new_client(url) as http:
                    (await http.get("/health")).raise_for_status()
            finally:
                slowest = max(slowest, time.monotonic() - started)
            await asyncio.sleep(PROBE_SECONDS)

    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS) as http:
        tasks = [asyncio.create_task(stream(http)), asyncio.create_task(probe())]
        started = time.monotonic()
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        elapsed = time.monotonic() - started
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            print(f"  the ordinary client failed: {task.exception()!r:.200}")
    return Measured(0.0 if done else num_tokens / elapsed, slowest)


def bomb(url: str, names: list[str], seconds: float) -> tuple[Measured, dict[str, Answers]]:
    """Measure beside the bombs."""
    command = [sys.executable, "-m", "tests.live.bombs", "--send-to", url, "--names",
               json.dumps(names), "--seconds", str(seconds)]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as bomber:
        measured = asyncio.run(measure(url, seconds))
        try:
            output, _ = bomber.communicate(timeout=ANSWER_SECONDS + 30)
        except subprocess.TimeoutExpired:
            bomber.kill()
            output = "{}"
    answers = {
        name: Answers(collections.Counter(statuses), slowest)
        for name, (statuses, slowest) in json.loads(output or "{}").items()
    }
    return measured, answers


async def warm_up(url: str) -> None:
    """Ordinary chats and forms, several at once: what the server keeps for them is there then."""
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    forms = [chat | {"guided_regex": f"[a-z]{{{number}}}"} for number in range(1, 9)]
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        for reply in await asyncio.gather(
            *(http.post("/v1/chat/completions", json=body) for body in [chat] * 4 + forms)
        ):
            assert reply.status_code == 200, reply.text[:200]


def is_alive(server: Launch) -> bool:
    """Whether the server answers."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{server.url}/health", timeout=5).status_code == 200
    return False


def report(server: Launch, names: list[str], seconds: float, num_rounds: int) -> int:
    """Bomb, judge and print; the exit code."""
    ranks = server.rank_pids()
    asyncio.run(warm_up(server.url))
    asyncio.run(measure(server.url, 5.0))
    start = [tree_mib(pid) for pid in ranks]
    losses, probes = [], []
    total: dict[str, Answers] = {name: Answers() for name in names}
    print("round  tokens/s alone  beside  loss  slowest probe alone, beside  rank 0, 1 MiB")
    for number in range(1, num_rounds + 1):
        before = asyncio.run(measure(server.url, max(5.0, seconds / 6)))
        # Those first whose turn did not come in the rounds before.
        in_turn = sorted(names, key=lambda name: total[name].statuses.total())
        beside, answers = bomb(server.url, in_turn, seconds)
        for name, one in answers.items():
            total[name].statuses += one.statuses
            total[name].slowest = max(total[name].slowest, one.slowest)
        after = asyncio.run(measure(server.url, max(5.0, seconds / 6)))
        alone = Measured(
            (before.pace + after.pace) / 2, max(before.slowest_probe, after.slowest_probe)
        )
        losses.append(1.0 - beside.pace / alone.pace if alone.pace else 1.0)
        probes.append(beside.slowest_probe)
        memory = ", ".join(f"{tree_mib(pid):.1f}" for pid in ranks)
        print(
            f"{number:5}  {alone.pace:14.1f}  {beside.pace:6.1f}  {losses[-1]:4.0%}  "
            f"{alone.slowest_probe:17.2f} s, {beside.slowest_probe:.2f} s  {memory}",
            flush=True,
        )
        if not is_alive(server):
            print("the server is gone")
            break
    time.sleep(REST_SECONDS)
    growth = [tree_mib(pid) - before for pid, before in zip(ranks, start, strict=True)]
    print("bomb                                      answers (how often), slowest")
    for name, one in total.items():
        statuses = ", ".join(f"{status} ({count})" for status, count in one.statuses.items())
        print(f"{name:40}  {statuses or 'not sent'}, {one.slowest:.1f} s")
    bad = sorted(
        name
        for name, one in total.items()
        if not one.statuses or any(not one.isdigit() or one == "500" for one in one.statuses)
    )
    loss = statistics.median(losses)
    checks = {
        f"{len(names)} bombs were answered, none by 500 ({', '.join(bad) or 'all'})": not bad,
        f"the stream lost {loss:.0%} of its pace, of {MAX_LOSS:.0%} at most (median of "
        f"{', '.join(f'{one:.0%}' for one in losses)})": loss <= MAX_LOSS,
        f"the slowest probe took {max(probes):.2f} s, of {MAX_PROBE_SECONDS:g} s at most":
            max(probes) <= MAX_PROBE_SECONDS,
        f"memory ended at {', '.join(f'{mib:+.1f}' for mib in growth)} MiB, of "
        f"{MAX_GROWTH_MIB:.0f} at most": max(map(abs, growth)) <= MAX_GROWTH_MIB,
        "the server is still there": is_alive(server),
        "no traceback in the log": "Traceback" not in server.log,
    }  # fmt: skip
    for text, is_met in checks.items():
        print(f"{'ok ' if is_met else 'NOT'} {text}")
    is_right = all(checks.values())
    print(f"verdict: {'passed' if is_right else 'FAILED'}, {len(losses)} rounds of {seconds:g} s")
    return 0 if is_right else 1


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    parser.add_argument("--without", nargs="+", default=[], metavar="PART")
    parser.add_argument("--send-to", metavar="URL", help="only send (used by the script itself)")
    parser.add_argument("--names", type=json.loads, help="with --send-to: bombs, as JSON")
    options = parser.parse_args()
    if options.send_to:
        run_bomber(options.send_to, options.names, options.seconds)
        return 0
    names = choose(options.only, options.without)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "nasty")
        server = Launch(mpirun(2), Path(folder) / "log", "--model", str(model), *FLAGS)
        try:
            server.wait_ready()
            return report(server, names, options.seconds, options.rounds)
        finally:
            if not is_alive(server):
                print("\n".join(server.log.splitlines()[-5:]))
            server.clean_up()


if __name__ == "__main__":
    sys.exit(main())

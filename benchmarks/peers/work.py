"""The work that every server gets, and its figures. No rank.

Prompts are random token ids, different each time, so that nothing comes out of a cache of computed
prefixes; answers are greedy and go on past the end-of-sequence token.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.apis import APIS, Api, Prompt
from benchmarks.http_client import HttpClient
from benchmarks.load import Sender, run_level
from benchmarks.metrics import summarize
from benchmarks.peers.environments import PeerError, say
from benchmarks.peers.processes import Neighbours, Server
from benchmarks.peers.results import QUIET

FIRST_ID, LAST_ID = 300, 31_999  # of the checkpoint's vocabulary, special tokens left out
WARMUP_SEED = 10**6


@dataclass(frozen=True)
class Task:
    """Requests that are sent together.

    Attributes:
        read: from a summary of benchmarks.metrics to named figures.
    """

    name: str
    concurrency: int
    prompt_length: int
    max_new_tokens: int
    read: Callable[[dict[str, Any]], dict[str, float]]


def _read_short(summary: dict[str, Any]) -> dict[str, float]:
    return {"decode_tok_s": 1e3 / summary["tpot_ms"]["mean"]}


def _read_long(summary: dict[str, Any]) -> dict[str, float]:
    return {
        "prefill_tok_s": summary["input_tokens"] / (summary["ttft_ms"]["mean"] / 1e3),
        "decode_1024_tok_s": 1e3 / summary["tpot_ms"]["mean"],
    }


def _read_batch(summary: dict[str, Any]) -> dict[str, float]:
    return {
        "batch_tok_s": summary["output_token_throughput"],
        "batch_ttft_p50_s": summary["ttft_ms"]["p50"] / 1e3,
        "batch_itl_p50_ms": summary["itl_ms"]["p50"],
    }


TASKS = {
    "short": Task("short", 1, 32, 65, _read_short),
    "long": Task("long", 1, 1024, 65, _read_long),
    "batch": Task("batch", 8, 1024, 128, _read_batch),
}
WARMUPS = (
    Task("warm-up", 1, 1024, 8, lambda summary: {}),
    Task("warm-up", 8, 32, 16, lambda summary: {}),
)
SETTLING = Task("settling", 1, 32, 8, lambda summary: {})
"""What a server that was stopped gets first."""


@dataclass(frozen=True)
class Measurement:
    """One task on one server.

    Attributes:
        others: share of all cores that everybody else used meanwhile.
    """

    figures: dict[str, float]
    others: float


def make_api(extra_body: dict[str, Any]) -> Api:
    """The completions API with prompts of token ids, which the text of a prompt spells here."""
    make_body = APIS["completions"].make_body

    def make(prompt: Prompt, model: str | None) -> dict[str, Any]:
        ids = [int(word) for word in prompt.text.split()]
        return make_body(prompt, model) | {"prompt": ids, "ignore_eos": True} | extra_body

    return replace(APIS["completions"], make_body=make)


def make_prompts(task: Task, seed: int) -> list[Prompt]:
    """The same prompts for every server that is given the same seed."""
    rng = random.Random(f"{seed} {task.prompt_length}")
    return [
        Prompt(
            " ".join(str(rng.randint(FIRST_ID, LAST_ID)) for _ in range(task.prompt_length)),
            task.max_new_tokens,
            task.prompt_length,
        )
        for _ in range(task.concurrency)
    ]


def measure(server: Server, task: Task, seed: int) -> Measurement:
    """Send one task's requests. Raises PeerError when an answer is not what was asked for."""
    neighbours = Neighbours(server)
    summary = asyncio.run(_send(server, task, make_prompts(task, seed)))
    others = neighbours.share()
    server.look_at_memory()
    asked = {
        "completed": task.concurrency,
        "input_tokens": task.concurrency * task.prompt_length,
        "output_tokens": task.concurrency * task.max_new_tokens,
    }
    got = {name: summary[name] for name in asked}
    if got != asked:
        raise PeerError(
            f"{server.launch.name}, {task.name}: asked {asked}, got {got}, "
            f"failures {summary['failures']}: see {server.log}"
        )
    return Measurement(task.read(summary), others)


async def _send(server: Server, task: Task, prompts: Sequence[Prompt]) -> dict[str, Any]:
    sender = Sender(
        make_api(dict(server.launch.extra_body)),
        lambda on_body: HttpClient(server.url, timeout=1800, stall_timeout=600, on_body=on_body),
        server.launch.model,
        {},
    )
    level = await run_level(sender, prompts, task.concurrency)
    sender.client.close()
    return summarize(level.replies, level.duration)


Results = dict[str, dict[str, list[Measurement]]]
"""By the server's name, then by the task's."""


def take_turns(servers: Sequence[Server], tasks: Mapping[str, int], results: Results) -> None:
    """Each task so many times on each server, one server after the other within each round.

    All others are stopped meanwhile. What was measured is in `results` however this ends.
    """
    for server in servers:
        results[server.launch.name] = {task: [] for task in tasks}
        server.pause()
    for server in servers:
        say(f"warming up {server.launch.name}")
        with server.turn():
            for task in WARMUPS:
                measure(server, task, WARMUP_SEED)
    for name, rounds in tasks.items():
        for number in range(rounds):
            for server in servers:
                with server.turn():
                    measure(server, SETTLING, WARMUP_SEED)
                    result = measure(server, TASKS[name], number)
                results[server.launch.name][name].append(result)
                shown = ", ".join(f"{key} {value:.1f}" for key, value in result.figures.items())
                note = f" (others used {result.others:.0%})" if result.others > QUIET else ""
                say(f"{server.launch.name}: {shown}{note}")

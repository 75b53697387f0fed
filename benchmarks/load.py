"""Sends the requests of one level, at a fixed concurrency or at random arrival times."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from benchmarks.apis import Api, Prompt, Reply, read_response
from benchmarks.http_client import HttpClient, HttpFailure
from benchmarks.metrics import percentile

PULSE_SECONDS = 0.02
DISPLAY_SECONDS = 0.25


@dataclass(frozen=True)
class ClientHealth:
    """Whether the client itself was in the way.

    Attributes:
        cpu_share: share of one core that the client used.
        lag_p99_ms: how late its event loop woke up; bounds the error of every time taken.
    """

    cpu_share: float
    lag_p99_ms: float

    @property
    def is_suspect(self) -> bool:
        """True when the figures may describe the client instead of the server."""
        return self.cpu_share > 0.8 or self.lag_p99_ms > 20.0


@dataclass(frozen=True)
class Level:
    """The outcome of one level.

    Attributes:
        num_unfinished: requests that were not answered yet, or not sent, when Ctrl-C came.
    """

    replies: list[Reply]
    duration: float
    client: ClientHealth
    num_unfinished: int = 0


class Sender:
    """Makes requests of one API against one server and counts events for the display."""

    def __init__(
        self,
        api: Api,
        make_client: Callable[[Callable[[bytes], None]], HttpClient],
        model: str | None,
        extra_body: dict[str, Any],
    ) -> None:
        self.num_events = 0
        self._api = api
        self._model = model
        self._extra_body = extra_body
        self.client = make_client(self._on_body)

    async def send(self, prompt: Prompt, started: float | None = None) -> Reply:
        """Make one request; a failure is part of the reply, never an exception."""
        body = json.dumps(self._api.make_body(prompt, self._model) | self._extra_body).encode()
        reply = Reply(time.perf_counter() if started is None else started)
        try:
            response = await self.client.post(self._api.path, body)
        except HttpFailure as failure:
            read_response(self._api, failure.response, reply)  # what came is worth counting
            reply.failure = str(failure)
            reply.finished = time.perf_counter()
            return reply
        read_response(self._api, response, reply)
        if reply.num_prompt_tokens is None:
            reply.num_prompt_tokens = prompt.num_tokens
        return reply

    def _on_body(self, data: bytes) -> None:
        self.num_events += data.count(self._api.token_mark)


async def run_level(
    sender: Sender,
    prompts: Sequence[Prompt],
    concurrency: int,
    request_rate: float | None = None,
    seed: int = 0,
) -> Level:
    """Send all prompts, at most `concurrency` at a time.

    With a rate, requests fall due at random times (Poisson) and their latency counts from the due
    time, also when they had to wait for a free place: a slow server cannot slow the clock down.
    Ctrl-C, which cancels this task, ends the level with what has been answered.
    """
    waiting = list(reversed(prompts))
    replies: list[Reply] = []
    due_times = _due_times(len(prompts), request_rate, seed)
    bar = tqdm(total=len(prompts), desc=f"{concurrency} concurrent", unit="request", disable=None)
    lags: list[float] = []
    helpers = [
        asyncio.create_task(_take_pulse(lags)),
        asyncio.create_task(_show_progress(bar, sender, replies)),
    ]
    cpu_start = time.process_time()
    start = time.perf_counter()

    async def work() -> None:
        while waiting:
            number = len(prompts) - len(waiting)
            prompt = waiting.pop()
            due = None
            if due_times is not None:
                due = start + due_times[number]
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            replies.append(await sender.send(prompt, due))
            bar.update()

    try:
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*(work() for _ in range(min(concurrency, len(prompts)))))
        end = time.perf_counter()
        cpu_share = (time.process_time() - cpu_start) / (end - start)
    finally:
        for helper in helpers:
            helper.cancel()
            with suppress(asyncio.CancelledError):
                await helper
        bar.close()
    lag = percentile(sorted(lags), 99) if lags else 0.0
    client = ClientHealth(cpu_share, lag * 1e3)
    return Level(replies, end - start, client, len(prompts) - len(replies))


def _due_times(count: int, rate: float | None, seed: int) -> list[float] | None:
    if rate is None:
        return None
    rng = random.Random(seed)
    times, now = [], 0.0
    for _ in range(count):
        times.append(now)
        now += rng.expovariate(rate)
    return times


async def _take_pulse(lags: list[float]) -> None:
    """Note how late the event loop wakes us up."""
    while True:
        due = time.perf_counter() + PULSE_SECONDS
        await asyncio.sleep(PULSE_SECONDS)
        lags.append(max(0.0, time.perf_counter() - due))


async def _show_progress(bar: tqdm, sender: Sender, replies: list[Reply]) -> None:
    if bar.disable:
        return
    last_events, last_time = sender.num_events, time.perf_counter()
    while True:
        await asyncio.sleep(DISPLAY_SECONDS)
        now = time.perf_counter()
        rate = (sender.num_events - last_events) / (now - last_time)
        last_events, last_time = sender.num_events, now
        failed = sum(reply.failure is not None for reply in replies)
        note = f"{rate:.0f} tokens/s" + (f", {failed} FAILED" if failed else "")
        bar.set_postfix_str(note)

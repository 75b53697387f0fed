"""One run of benchmark.py: find the server, make prompts, measure each level, write files."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.apis import APIS, Prompt
from benchmarks.html_report import write_html
from benchmarks.http_client import HttpClient, HttpFailure
from benchmarks.load import Level, Sender, run_level
from benchmarks.metrics import read_server_counters, server_view, summarize
from benchmarks.prompts import PromptError, PromptMaker, TextCodec, find_codec, fit, read_dataset
from benchmarks.report import FORMAT, format_table, level_record, write_json, write_log

PROMPT_FOLDER = Path(__file__).resolve().parents[1] / "prompt"


INTERRUPTED = 130  # what shells give for Ctrl-C
TERMINATED = 143  # and for SIGTERM


class BenchmarkError(Exception):
    """A run that cannot go on; the message is one line with cause and cure."""


async def find_model(client: HttpClient) -> str:
    """The first model that the server lists."""
    try:
        response = await client.get("/v1/models")
        return json.loads(response.body)["data"][0]["id"]
    except (HttpFailure, ValueError, KeyError, IndexError, TypeError) as error:
        raise BenchmarkError("the server lists no model: name it, --model NAME") from error


async def check_server(client: HttpClient) -> None:
    """Say at once when there is nobody to measure."""
    try:
        await client.get("/health")
    except HttpFailure as failure:
        raise BenchmarkError(
            f"no server at {client.url} ({failure}): start it, or name it with --url"
        ) from failure


async def read_counters(client: HttpClient) -> dict[str, float]:
    """The server's own counters; empty where it has none."""
    try:
        response = await client.get("/metrics")
        return read_server_counters(response.body.decode()) if response.status == 200 else {}
    except (HttpFailure, ValueError):
        return {}


async def hint_at_models(client: HttpClient, model: str | None) -> str:
    """Half a sentence more where the model that was named is none of the server's."""
    with suppress(HttpFailure, ValueError, KeyError, TypeError):
        response = await client.get("/v1/models")
        names = [one["id"] for one in json.loads(response.body)["data"]]
        if model is not None and model not in names:
            return f"; it has no model {model}, but {', '.join(names)}"
    return ""


class PromptSource:
    """Where the prompts of all levels come from."""

    def __init__(self, args: argparse.Namespace, sender: Sender, codec: TextCodec | None) -> None:
        self._args = args
        self._sender = sender
        self.codec = codec
        self._dataset: list[Prompt] = []
        self._maker: PromptMaker | None = None
        self._overhead: int | None = None
        self._num_taken = 0

    async def take(self, count: int) -> list[Prompt]:
        """The next prompts."""
        if self._args.dataset is not None:
            if not self._dataset:
                self._dataset = await self._read_dataset()
            self._num_taken += count
            numbers = range(self._num_taken - count, self._num_taken)
            return [self._dataset[number % len(self._dataset)] for number in numbers]
        if self._maker is None:
            assert self.codec is not None
            self._maker = PromptMaker(
                self.codec,
                PROMPT_FOLDER,
                self._args.prompt_length,
                same_prompt=self._args.same_prompt,
            )
        if self._overhead is None:
            self._overhead = await self._find_overhead()
        return [
            await self._maker.make(self._args.max_new_tokens, self._overhead) for _ in range(count)
        ]

    async def _read_dataset(self) -> list[Prompt]:
        prompts = read_dataset(self._args.dataset, self._args.max_new_tokens)
        if self.codec is None:
            return prompts
        return [
            Prompt(one.text, one.max_new_tokens, len(await self.codec.encode(one.text)))
            for one in prompts
        ]

    async def _find_overhead(self) -> int:
        """Tokens that the chat template adds, from the server's own count of a short chat."""
        if self._args.api != "chat":
            return 0
        assert self.codec is not None
        text = await fit(self.codec, "one two three four five six seven", 16)
        reply = await self._sender.send(Prompt(text, 1))
        if reply.failure is not None:
            raise BenchmarkError(f"a first short chat failed: {reply.failure}")
        return (reply.num_prompt_tokens or 16) - 16


async def count_missing(codec: TextCodec | None, level: Level) -> None:
    """Count the output tokens of replies whose server sent no usage."""
    for reply in level.replies:
        if reply.failure is None and reply.num_output_tokens is None:
            if codec is None:
                raise BenchmarkError(
                    "the server sends no token counts: name its tokenizer, --tokenizer DIR"
                )
            num_special = len(await codec.encode(""))
            reply.num_output_tokens = len(await codec.encode(reply.text)) - num_special


async def run(args: argparse.Namespace) -> int:
    """The whole benchmark, or what there is of it when it is interrupted; the exit code."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}

    def make_client(on_body: Callable[[bytes], None] = lambda data: None) -> HttpClient:
        return HttpClient(
            args.url.rstrip("/").removesuffix("/v1"),  # as OpenAI's clients write it
            headers=headers,
            timeout=args.timeout,
            stall_timeout=args.stall_timeout,
            on_body=on_body,
        )

    helper = make_client()
    await check_server(helper)
    model = args.model
    if model is None and args.api != "native":
        model = await find_model(helper)
    ignore_eos = {} if args.no_ignore_eos else {"ignore_eos": True}
    sender = Sender(APIS[args.api], make_client, model, ignore_eos | args.extra_body)
    try:
        codec = await find_codec(helper, model, args.tokenizer)
    except PromptError as error:
        if args.dataset is None:
            raise PromptError(f"{error}{await hint_at_models(helper, args.model)}") from error
        codec = None  # a dataset can be sent without; servers that send usage count for us
    source = PromptSource(args, sender, codec)
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    report = {
        "format": FORMAT,
        "started": started,
        "settings": describe_settings(args, model),
        "client_machine": (
            f"{platform.node()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        ),
        "levels": [],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    end = None
    try:
        for concurrency in args.max_concurrent_requests:
            warmup = concurrency if args.warmup is None else args.warmup
            prompts = await source.take(warmup + (args.num_requests or 10 * concurrency))
            await asyncio.gather(*(sender.send(prompt) for prompt in prompts[:warmup]))
            before = await read_counters(helper)
            level = await run_level(
                sender, prompts[warmup:], concurrency, args.request_rate, args.seed
            )
            after = await read_counters(helper)
            await count_missing(codec, level)
            summary = summarize(level.replies, level.duration, dict(args.slo))
            record = level_record(concurrency, level, summary, server_view(before, after))
            report["levels"].append(record)
            write_log(args.output / f"{concurrency}.log", report, record)
            write_json(args.output / "benchmark.json", report)
            if level.num_unfinished:
                end = "interrupted"
                break
    except HttpFailure as failure:
        end = f"{args.url} has gone away ({failure})"
        if not report["levels"]:
            raise
    except asyncio.CancelledError:
        end = "interrupted"
        if not report["levels"]:
            raise
    helper.close()
    sender.client.close()
    files = [f"{level['concurrency']}.log" for level in report["levels"]] + ["benchmark.json"]
    if args.html:
        write_html(args.output / "benchmark.html", report)
        files.append("benchmark.html")
    print("\n".join(format_table(report)))
    print(f"\nWritten to {args.output.resolve()}: {', '.join(files)}")
    if end is not None:
        done, asked = len(report["levels"]), len(args.max_concurrent_requests)
        print(f"benchmark.py: {end}; {done} of {asked} levels are above", file=sys.stderr)
        return INTERRUPTED if end == "interrupted" else 1
    return 0 if all(level["summary"]["completed"] for level in report["levels"]) else 1


def describe_settings(args: argparse.Namespace, model: str | None) -> dict[str, Any]:
    """What a reader needs in order to run the same again; never the key."""
    settings = {
        "url": args.url,
        "api": args.api,
        "model": model,
        "prompt_length": None if args.dataset else args.prompt_length,
        "dataset": str(args.dataset) if args.dataset else None,
        "max_new_tokens": args.max_new_tokens,
        "request_rate": args.request_rate,
        "same_prompt": args.same_prompt,
        "ignore_eos": not args.no_ignore_eos,
    }
    return settings | ({"extra_body": args.extra_body} if args.extra_body else {})

"""Measure a running server: latency and throughput at one or several levels of concurrency.

    python benchmark.py --prompt_length 1024 --max_concurrent_requests 1 2 3 --max_new_tokens 128

leaves 1.log, 2.log and 3.log (one per level), benchmark.json and, with --html, benchmark.html.
Works with the native routes of AutoTP Serving and with any OpenAI-compatible server:

    python benchmark.py --url http://127.0.0.1:8000 --api chat --model NAME --html
    python benchmark.py --compare before.json after.json

Only completed requests count; failed ones are counted and shown by kind. Every prompt has exactly
the asked number of tokens and a beginning of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.apis import APIS
from benchmarks.http_client import HttpFailure
from benchmarks.metrics import parse_slo_limit
from benchmarks.prompts import PromptError
from benchmarks.report import format_comparison, read_json
from benchmarks.session import INTERRUPTED, TERMINATED, BenchmarkError, run

NOTHING_MEASURED = "benchmark.py: interrupted before a level was measured"


def build_parser() -> argparse.ArgumentParser:
    """The command line; each flag may be spelt with hyphens too."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, **options: Any) -> None:
        names = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
        parser.add_argument(*names, dest=name, **options)

    # fmt: off
    add("prompt_length", type=positive, default=1024, metavar="TOKENS",
        help="tokens of each prompt: 32, 1024, 2048 or any other number (1024)")
    add("max_concurrent_requests", type=positive, nargs="+", default=[1], metavar="N",
        help="levels of concurrency, measured one after the other (1)")
    add("max_new_tokens", type=positive, default=128, metavar="TOKENS",
        help="tokens to generate per request (128)")
    add("url", default="http://127.0.0.1:8000", help="the server (http://127.0.0.1:8000)")
    add("api", choices=sorted(APIS), default="native", help="routes to use (native)")
    add("model", help="model name; default: the first in /v1/models (native: none)")
    add("api_key", default=os.environ.get("OPENAI_API_KEY"),
        help="sent as bearer token (OPENAI_API_KEY)")
    add("num_requests", type=positive, metavar="N",
        help="requests per level (10 x concurrency)")
    add("warmup", type=non_negative, metavar="N",
        help="requests before each level, not counted (as many as are concurrent)")
    add("request_rate", type=positive_float, metavar="PER_SECOND",
        help="random arrivals at this rate; latency then counts from the time a request fell due")
    add("dataset", type=Path, metavar="FILE",
        help='prompts from a file: .jsonl with "prompt", ShareGPT .json, or .txt by lines')
    add("same_prompt", action="store_true",
        help="send one and the same prompt: a prefix cache will answer most of it")
    add("no_ignore_eos", action="store_true", help="let answers end where the model ends them")
    add("extra_body", type=json_object, default={}, metavar="JSON",
        help="further fields of each request")
    add("tokenizer", metavar="DIR", help="tokenizer folder, for servers without /tokenize")
    add("slo", type=slo_limit, nargs="+", default=[], metavar="NAME=MS",
        help="limits for goodput: ttft, tpot (mean), itl (longest) and e2e, in milliseconds")
    add("timeout", type=positive_float, default=600.0, metavar="S",
        help="most seconds per request (600)")
    add("stall_timeout", type=positive_float, default=60.0, metavar="S",
        help="a request that brings nothing for so long has failed (60)")
    add("seed", type=int, default=0, help="of the arrival times (0)")
    add("output", type=Path, default=Path("."), metavar="DIR", help="where the files go (.)")
    add("html", action="store_true", help="write benchmark.html with plots")
    add("compare", type=Path, nargs=2, metavar=("A", "B"),
        help="show two JSON files side by side; no run")
    # fmt: on
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def non_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {value:g}")
    return value


def slo_limit(text: str) -> tuple[str, float]:
    try:
        return parse_slo_limit(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


async def run_until_terminated(args: argparse.Namespace) -> int:
    """The benchmark, which SIGTERM ends as Ctrl-C does: with what has been answered.

    Started in the background of a script, or by nohup there, it does not hear Ctrl-C.
    """
    task = asyncio.current_task()
    assert task is not None
    was_terminated = False

    def terminate() -> None:
        nonlocal was_terminated
        was_terminated = True
        task.cancel()

    with suppress(NotImplementedError):  # Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    try:
        exit_code = await run(args)
    except asyncio.CancelledError:
        if not was_terminated:
            raise
        print(NOTHING_MEASURED, file=sys.stderr)
        return TERMINATED
    return TERMINATED if was_terminated and exit_code == INTERRUPTED else exit_code


def main(argv: list[str] | None = None) -> int:
    """Exit code 0: figures; 1: a level that did not complete one request, or a server that went
    away; 2: nothing was run; 130: Ctrl-C; 143: SIGTERM.
    """
    args = build_parser().parse_args(argv)
    try:
        if args.compare:
            first, second = (read_json(path) for path in args.compare)
            names = [path.stem for path in args.compare]
            if names[0] == names[1]:
                names = [str(path) for path in args.compare]
            print("\n".join(format_comparison(names, first, second)))
            return 0
        return asyncio.run(run_until_terminated(args))
    except HttpFailure as failure:
        print(f"benchmark.py: {args.url} has gone away ({failure})", file=sys.stderr)
        return 2
    except (BenchmarkError, PromptError, ValueError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(NOTHING_MEASURED, file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

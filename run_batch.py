"""Answer a file of requests in OpenAI's batch format, with a server that runs.

    python run_batch.py -i requests.jsonl -o answers.jsonl --url http://127.0.0.1:8000

Each line of the input is {"custom_id": "...", "method": "POST", "url": "/v1/chat/completions",
"body": {...}}; each answer is a line with its custom_id, written as soon as it is there. Started
again after a crash or Ctrl+C, it goes on with those that have no answer yet. A server that is not
there, is full or recovers is asked again, for --patience seconds.

Exit code 0 if all were answered with a 2xx, 1 if not, 2 if the files cannot be used.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.http_client import HttpClient, HttpFailure, Response

MAX_LINE_BYTES = 64 * 2**20
RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 30.0
ASK_AGAIN = {408, 429, 502, 503}


class BatchError(Exception):
    """A file that cannot be used; the sentence names the line and the cure."""


def read_requests(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of an input file by their custom_id, all of them looked at.

    Raises:
        BatchError: naming the line.
    """
    requests: dict[str, dict[str, Any]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if not line.strip():
                continue
            mistake = None
            try:
                item = json.loads(line)
            except (ValueError, RecursionError):
                item = None
            if len(line) > MAX_LINE_BYTES:
                mistake = f"is longer than {MAX_LINE_BYTES >> 20} MiB"
            elif not isinstance(item, dict):
                mistake = "is not a JSON object"
            elif not isinstance(item.get("custom_id"), str) or item["custom_id"] in requests:
                mistake = "needs a custom_id, a text that no other line has"
            elif item.get("method") != "POST" or not str(item.get("url")).startswith("/v1/"):
                mistake = 'needs "method": "POST" and a "url" such as /v1/chat/completions'
            elif not set(item["url"]) <= set(map(chr, range(33, 127))):
                mistake = "has a url with blanks or signs that no url has"
            elif not isinstance(item.get("body"), dict) or item["body"].get("stream"):
                mistake = 'needs a "body", an object without "stream": true'
            if mistake:
                raise BatchError(f"{path}, line {number} {mistake}")
            requests[item["custom_id"]] = item
    return requests


def open_output(path: Path) -> tuple[BinaryIO, dict[str, bool]]:
    """Open an output file to go on with, a line that a crash has cut taken off.

    Returns:
        The file, and whether each custom_id that has its answer got a good one.

    Raises:
        BatchError: the file holds something else.
    """
    answered: dict[str, bool] = {}
    file = path.open("a+b")
    file.seek(0)
    end = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        try:
            item = json.loads(line)
            answered[item["custom_id"]] = item["response"]["status_code"] < 300
        except (ValueError, KeyError, TypeError) as error:
            file.close()
            raise BatchError(
                f"{path}, line {number} is no answer of a batch: name another output file"
            ) from error
        end += len(line)
    file.truncate(end)
    return file, answered


def make_answer(custom_id: str, response: Response) -> dict[str, Any]:
    """A line of the output, in OpenAI's format."""
    try:
        body = json.loads(response.body)
    except ValueError:
        body = response.body.decode(errors="replace")
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": {
            "status_code": response.status,
            "request_id": response.headers.get("x-request-id", ""),
            "body": body,
        },
        "error": None,
    }


async def ask(client: HttpClient, item: dict[str, Any], patience: float) -> Response:
    """Have one request answered, asking again where the server may answer later.

    Raises:
        BatchError: it did not within `patience` seconds.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    delay = RETRY_SECONDS
    body = json.dumps(item["body"]).encode()
    while True:
        wait = delay
        try:
            response = await client.post(item["url"], body)
            if response.status not in ASK_AGAIN:
                return response
            what = f"status {response.status}"
            with suppress(ValueError):
                wait = max(wait, float(response.headers.get("retry-after", "")))
        except HttpFailure as error:
            what = str(error)
        if loop.time() + wait > deadline:
            raise BatchError(f"{client.url} does not answer ({what}): start again to go on")
        await asyncio.sleep(wait)
        delay = min(2 * delay, MAX_RETRY_SECONDS)


async def run_batch(
    client: HttpClient,
    requests: list[dict[str, Any]],
    output: BinaryIO,
    num_workers: int,
    patience: float,
) -> int:
    """Have all requests answered, so many at a time; how many got another status than 2xx.

    Raises:
        BatchError: the server is not there.
    """
    waiting = iter(requests)
    num_bad = 0

    async def work() -> None:
        nonlocal num_bad
        for item in waiting:
            answer = make_answer(item["custom_id"], await ask(client, item, patience))
            num_bad += answer["response"]["status_code"] >= 300
            output.write(json.dumps(answer).encode() + b"\n")
            output.flush()
            os.fsync(output.fileno())

    workers = [asyncio.ensure_future(work()) for _ in range(num_workers)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        client.close()
    return num_bad


def main(argv: list[str] | None = None) -> int:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-i", "--input", type=Path, required=True, metavar="FILE", help="requests, a line each")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="answers, a line each")
    add("--url", default="http://127.0.0.1:8000", help="the server (http://127.0.0.1:8000)")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="(OPENAI_API_KEY)")
    add("--max-concurrent-requests", type=int, default=16, metavar="N", help="at a time (16)")
    add("--patience", type=float, default=600.0, metavar="S",
        help="seconds in which a server that is not there may come back (600)")  # fmt: skip
    add("--timeout", type=float, default=3600.0, metavar="S", help="most per request (3600)")
    options = parser.parse_args(argv)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else None
    try:
        if options.max_concurrent_requests < 1:
            raise BatchError("--max-concurrent-requests must be at least 1")
        client = HttpClient(
            options.url,
            headers=headers,
            timeout=options.timeout,
            stall_timeout=options.timeout,
        )
        requests = read_requests(options.input)
        output, answered = open_output(options.output)
    except (BatchError, OSError, ValueError) as error:
        print(f"run_batch.py: error: {error}", file=sys.stderr)
        return 2
    strangers = answered.keys() - requests.keys()
    if strangers:
        print(
            f"run_batch.py: error: {options.output} has answers to requests that are not in "
            f"{options.input}: name another output file",
            file=sys.stderr,
        )
        return 2
    left = [item for custom_id, item in requests.items() if custom_id not in answered]
    num_bad = len(answered) - sum(answered.values())
    num_workers = min(options.max_concurrent_requests, max(1, len(left)))
    with output:
        try:
            num_bad += asyncio.run(run_batch(client, left, output, num_workers, options.patience))
        except BatchError as error:
            print(f"run_batch.py: error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("run_batch.py: interrupted: start again to go on", file=sys.stderr)
            return 1
    print(f"{len(requests)} requests, {len(left)} of them now, {num_bad} without a 2xx")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())

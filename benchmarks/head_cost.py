"""What a head costs: its tokens/s beside those of the same ranks under `mpirun`, in pairs. No rank.

    python -m benchmarks.head_cost --pairs 6
    python -m benchmarks.head_cost --model MODEL --streams 1 64 -- --low-bit sym_int4

Starts both servers, `mpirun -np 2 python serving.py` and `python serving.py --tensor-parallel-size
2`, and lets each answer the same requests, one server after the other, so many times; who begins
changes from pair to pair. The other one sleeps meanwhile. A line a pair, with the share of the
cores that others took; then the median of the ratios for each number of streams. The last line is
JSON. Words after `--` go to both servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmark import positive
from benchmarks.apis import Prompt
from benchmarks.http_client import HttpClient
from benchmarks.load import Sender, run_level
from benchmarks.metrics import summarize
from benchmarks.peers.environments import ROOT, PeerError
from benchmarks.peers.processes import Launch, Neighbours, Server
from benchmarks.peers.work import make_api

PROMPT_LEN = 32


def launch(words: Sequence[str], options: argparse.Namespace, name: str) -> Launch:
    """One of the two servers, `words` before what both of them get."""
    flags = ["--model", options.model, "--host", "127.0.0.1", "--port", "{port}"]
    flags += ["--max-num-seqs", str(max(options.streams)), "--log-level", "warning"]
    flags += ["--served-model-name", "model", *options.flags]
    environment = {"OMP_NUM_THREADS": str(options.threads), "PYTHONUNBUFFERED": "1"}
    return Launch(name, (*words, *flags), environment)


def measure(server: Server, num_streams: int, num_tokens: int, seed: int) -> tuple[float, float]:
    """Tokens/s of so many streams at once, and the share of all cores that others took.

    Raises:
        PeerError: an answer is not what was asked for.
    """
    draws = random.Random(f"{seed} {num_streams}")
    prompts = [
        Prompt(" ".join(str(draws.randint(300, 7999)) for _ in range(PROMPT_LEN)), num_tokens)
        for _ in range(num_streams)
    ]
    neighbours = Neighbours(server)
    summary = asyncio.run(send(server, prompts))
    if summary["output_tokens"] != num_streams * num_tokens:
        raise PeerError(f"{server.launch.name}: {summary['failures']}: see {server.log}")
    throughput = summary["output_token_throughput"]
    assert isinstance(throughput, float)
    return throughput, neighbours.share()


async def send(server: Server, prompts: Sequence[Prompt]) -> dict[str, object]:
    """All prompts at once; the summary."""
    sender = Sender(
        make_api({}),
        lambda on_body: HttpClient(server.url, timeout=600, stall_timeout=120, on_body=on_body),
        server.launch.model,
        {},
    )
    level = await run_level(sender, prompts, len(prompts))
    sender.client.close()
    return summarize(level.replies, level.duration)


def compare(head: Server, mpirun: Server, options: argparse.Namespace) -> dict[str, float]:
    """Print the pairs; the median ratio of each number of streams."""
    medians = {}
    for num_streams in options.streams:
        for server in (head, mpirun):
            measure(server, num_streams, 16, -1)
        ratios = []
        print("streams  pair  head tok/s  mpirun tok/s  ratio  others", flush=True)
        for pair in range(options.pairs):
            found = {}
            for server in (head, mpirun) if pair % 2 else (mpirun, head):
                found[server] = measure(server, num_streams, options.tokens, pair)
            (ours, others), (theirs, more) = found[head], found[mpirun]
            ratios.append(ours / theirs)
            print(
                f"{num_streams:7}  {pair:4}  {ours:10.1f}  {theirs:12.1f}  {ratios[-1]:5.3f}  "
                f"{max(others, more):6.0%}",
                flush=True,
            )
        medians[str(num_streams)] = statistics.median(ratios)
        print(f"{num_streams} streams: median ratio {medians[str(num_streams)]:.3f}", flush=True)
    return medians


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "demo_model"))
    parser.add_argument("--pairs", type=positive, default=6)
    parser.add_argument("--streams", type=positive, nargs="+", default=[1, 64])
    parser.add_argument("--tokens", type=positive, default=256, help="of each completion")
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--threads", type=positive, default=1, help="of each rank")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="of serving.py, for both")
    options = parser.parse_args()
    ranks, python = str(options.ranks), sys.executable
    mpirun = [str(Path(python).with_name("mpirun")), "-np", ranks, python, "serving.py"]
    head = [python, "serving.py", "--tensor-parallel-size", ranks]
    folder = Path(tempfile.mkdtemp(prefix="head_cost-"))  # stays: a failure names its logs
    try:
        with ExitStack() as stack:
            servers = []
            for name, words in (("head", head), ("mpirun", mpirun)):
                log = folder / f"{name}.log"
                server = stack.enter_context(Server(launch(words, options, name), log))
                server.wait_until_ready()
                servers.append(server)
            medians = compare(*servers, options)
    except PeerError as error:
        print(f"benchmarks.head_cost: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"ratio": medians, "pairs": options.pairs, "tokens": options.tokens}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

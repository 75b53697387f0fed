"""Run a peer beside ours and print one table: `python -m benchmarks.peers llama_cpp`. No rank.

    python -m benchmarks.peers vllm_cpu --formats w8a8 --tasks short long
    python -m benchmarks.peers --show .venv-peers/results/*.json       # tables of earlier runs

Sets up what is missing (environment, build, checkpoints) under .venv-peers/, then starts our
servers and the peer's, lets them take turns at each task, and shows medians. All processes of
those whose turn it is not are stopped. A peer's formats come one after the other, each beside ours.
Run it in the environment of the server, on a machine with nothing else to do: rounds in which
others used over 5 % of the cores do not count as long as there are better ones. Each run leaves a
file; `--show` puts the rounds of several together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.peers.checkpoint import SHAPE, make_checkpoint
from benchmarks.peers.environments import HOME, ROOT, PeerError, say
from benchmarks.peers.ours import count_cache_bytes, describe_ours, launch_ours
from benchmarks.peers.plot import draw_tables
from benchmarks.peers.processes import Launch, Server, set_session_nice
from benchmarks.peers.results import merge_reports
from benchmarks.peers.table import describe_machine, format_table
from benchmarks.peers.work import TASKS, Measurement, Results, take_turns

PEERS = ("llama_cpp", "vllm_cpu", "openvino_genai", "transformers_generate")
DEFAULT_LAYOUTS = ("2x1", "1x2")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "peers", nargs="*", metavar="PEER", help=f"whom to run beside ours: {', '.join(PEERS)}"
    )
    parser.add_argument("--formats", nargs="+", metavar="FORMAT", help="the peer's; default: all")
    parser.add_argument(
        "--ours",
        nargs="+",
        metavar="FORMAT[/HEAD]:RANKSxTHREADS",
        help="our rows; the first is set against the peer (default: what is most like the peer's "
        f"format, with {' and '.join(DEFAULT_LAYOUTS)})",
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of short and long (3)")
    parser.add_argument(
        "--batch_rounds", "--batch-rounds", type=int, default=1, help="of batch (1)"
    )
    parser.add_argument(
        "--nice",
        type=int,
        default=0,
        metavar="N",
        help="priority of servers and client: -20, as root, on a machine that is shared (0)",
    )
    parser.add_argument("--threads", type=int, default=2, help="the peer's (2)")
    parser.add_argument(
        "--shape", default=SHAPE, help=f"see scripts/make_random_checkpoint.py ({SHAPE})"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the JSON (.venv-peers/results/PEER-TIME.json)"
    )
    parser.add_argument(
        "--setup_only", "--setup-only", action="store_true", help="install, build and convert only"
    )
    parser.add_argument(
        "--show", nargs="+", type=Path, metavar="FILE", help="tables of earlier runs; no run"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the tables (SVG)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.show:
            reports = [json.loads(path.read_text(encoding="utf-8")) for path in args.show]
            show(reports, args.plot)
            return 0
        if not args.peers or set(args.peers) - set(PEERS):
            parser.error(f"name one or several of {', '.join(PEERS)}")
        if args.output is not None and len(args.peers) > 1:
            parser.error("--output is for one peer")
        command = shlex.join(["python", "-m", "benchmarks.peers", *(argv or sys.argv[1:])])
        reports = [run(peer, args, command) for peer in args.peers]
        show([report for report in reports if report is not None], args.plot)
    except PeerError as error:
        print(f"benchmarks.peers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.peers: interrupted", file=sys.stderr)
        return 130
    return 0


def show(reports: Sequence[Mapping[str, Any]], plot: Path | None) -> None:
    """Print the tables, and draw them if asked to."""
    tables = merge_reports(reports)
    print("\n\n".join(map(format_table, tables)))
    if plot is not None and tables:
        plot.write_text(draw_tables(tables), encoding="utf-8")


def run(peer_name: str, args: argparse.Namespace, command: str) -> Mapping[str, Any] | None:
    """Set up, measure, write the JSON. Raises PeerError."""
    peer = import_module(f"benchmarks.peers.{peer_name}")
    formats = args.formats or list(peer.FORMATS)
    for name in formats:
        if name not in peer.FORMATS:
            raise PeerError(f"{peer_name} has no format {name}: one of {', '.join(peer.FORMATS)}")
    versions = peer.set_up()
    checkpoint = make_checkpoint(args.shape)
    cache = count_cache_bytes(checkpoint)
    sittings = []
    for name in formats:
        specs = args.ours or [f"{peer.FORMATS[name]}:{layout}" for layout in DEFAULT_LAYOUTS]
        ours = [launch_ours(checkpoint, spec, cache) for spec in specs]
        sittings.append([*ours, peer.launch(checkpoint, name, args.threads)])
    if args.setup_only:
        return None
    # A kill, too, must end the servers that this started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.nice:
        os.setpriority(os.PRIO_PROCESS, 0, args.nice)
        set_session_nice(os.getpid(), args.nice)
    tasks = {
        name: args.batch_rounds if name == "batch" else args.rounds
        for name in TASKS
        if name in args.tasks
    }
    report = {
        "machine": describe_machine(),
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "ours": describe_ours(),
        "versions": versions,
        "shape": args.shape,
        "command": command,
        "sittings": [],
    }
    try:
        for launches in sittings:
            run_sitting(launches, tasks, args.nice, report["sittings"])
    finally:  # of a run that was interrupted remains what it had measured
        if report["sittings"]:
            path = (
                args.output or HOME / "results" / f"{peer_name}-{datetime.now():%m%d-%H%M%S}.json"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            say(f"written to {path}")
    return report


def run_sitting(
    launches: Sequence[Launch], tasks: Mapping[str, int], nice: int, sittings: list[Any]
) -> None:
    """Some servers side by side: a row each, the peer's last, added to `sittings`."""
    with contextlib.ExitStack() as stack:
        servers = []
        for number, launch in enumerate(launches):
            say(f"starting {launch.name}")
            server = stack.enter_context(Server(launch, HOME / "logs" / f"{number}.log", nice))
            server.wait_until_ready()  # one after the other: starting takes all cores
            server.pause()
            servers.append(server)
        results: Results = {}
        try:
            take_turns(servers, tasks, results)
        finally:
            if any(rounds for tasks in results.values() for rounds in tasks.values()):
                sittings.append([make_record(one, results[one.launch.name]) for one in servers])


def shorten(word: str) -> str:
    """Without the folders of this machine."""
    for folder in (Path(sys.executable).parent, ROOT):
        word = word.removeprefix(f"{folder}/")
    return word


def make_record(server: Server, measured: Mapping[str, list[Measurement]]) -> dict[str, Any]:
    """What a file holds of one server's part in a sitting."""
    return {
        "name": server.launch.name,
        "memory_mib": server.peak_memory / 2**20,
        "rounds": {
            task: [{**one.figures, "others": one.others} for one in measurements]
            for task, measurements in measured.items()
        },
        "command": [shorten(word) for word in server.launch.words],
    }


if __name__ == "__main__":
    sys.exit(main())

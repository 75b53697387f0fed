"""One batch, offline: how long prefill takes and how long each decode step. Every rank.

    python -m benchmarks.latency --model demo_model --low-bit sym_int8 --input-len 1024
    mpirun -np 2 python -m benchmarks.latency --model MODEL --batch-size 8 --output-len 128

Every flag of serving.py works too. Beside each figure stands the least time that this machine
needs for the same work, from its memory bandwidth and matmul rate measured at the start, and the
fraction of it that was reached. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from autotp_serving import SamplingParams
from autotp_serving.config import ConfigError
from autotp_serving.distributed.launch import GroupFailure, LaunchError, is_first_rank
from autotp_serving.request import RequestError
from benchmarks.bound import Bounds
from benchmarks.metrics import Spread
from benchmarks.offline import (
    TimedLLM,
    add_flag,
    make_prompt,
    measure_bounds,
    parse_serving_flags,
    positive,
    run_script,
    settings_of,
)

NAME = "benchmarks.latency"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    # fmt: off
    add_flag(parser, "input-len", type=positive, default=1024, help="tokens of each prompt (1024)")
    add_flag(parser, "output-len", type=positive, default=128, help="tokens of each answer (128)")
    add_flag(parser, "batch-size", type=positive, default=1, help="prompts side by side (1)")
    add_flag(parser, "num-iters", type=positive, default=3, help="batches that are measured (3)")
    add_flag(parser, "num-iters-warmup", type=int, default=1, help="batches before those (1)")
    add_flag(parser, "output-json", type=Path, metavar="FILE",
             help="write the JSON here as well, with every step's time")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 when it cannot start."""
    options, rest = build_parser().parse_known_args(argv)
    try:
        config = parse_serving_flags(rest, NAME)
        if options.batch_size > config.max_num_seqs:
            config = replace(config, max_num_seqs=options.batch_size)
        if config.speculative_tokens:
            raise ConfigError("--speculative-tokens: python -m benchmarks.drafts measures drafts")
        config = replace(config, speculative_tokens=0)  # steps of one token each
        bounds, hardware = measure_bounds(config)
        with TimedLLM(config.model_path, **settings_of(config)) as llm:
            runs = run(llm, options)
    except (ConfigError, GroupFailure, LaunchError, RequestError, OSError) as error:
        if is_first_rank(os.environ):
            print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    assert bounds is not None  # the other ranks never come here
    result = {
        "model": config.model_path,
        "low_bit": config.low_bit or "default",
        "input_len": options.input_len,
        "output_len": options.output_len,
        "batch_size": options.batch_size,
        "hardware": asdict(hardware),
        **summarize(runs, bounds, options),
    }
    print(hardware.describe())
    print("\n".join(format_result(result)))
    if config.profile is not None:
        print(show_profile(Path(config.profile)))
    if options.output_json is not None:
        steps = [run["step_seconds"] for run in runs]
        options.output_json.write_text(json.dumps(result | {"step_seconds": steps}) + "\n")
    print(json.dumps(result))
    return 0


def run(llm: TimedLLM, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of the prefill and of each decode step, per measured batch."""
    params = SamplingParams(max_tokens=options.output_len, temperature=0.0, ignore_eos=True)
    rng = random.Random(0)
    runs = []
    for number in range(options.num_iters_warmup + options.num_iters):
        prompts = [
            make_prompt(rng, options.input_len, llm.tokenizer.vocab_size)
            for _ in range(options.batch_size)
        ]
        llm.arrivals.clear()
        started = time.perf_counter()
        llm.generate(prompts, params, show_progress=False)
        if number >= options.num_iters_warmup:
            runs.append(split_run(started, llm.arrivals, options.batch_size))
    return runs


def split_run(
    started: float, arrivals: list[tuple[float, tuple[str, ...]]], batch_size: int
) -> dict[str, Any]:
    """Cut a batch into prefill, which ends when all have a first token, and steps that follow.

    Only steps that gave every sequence a token count as decode steps: in others, the last part of
    a prompt may have run as well.
    """
    seen: set[str] = set()
    previous = started
    prefill = None
    steps = []
    for moment, ids in arrivals:
        if prefill is None:
            seen.update(ids)
            if len(seen) == batch_size:
                prefill = moment - started
        elif len(ids) == batch_size:
            steps.append(moment - previous)
        previous = moment
    assert prefill is not None
    return {"prefill_seconds": prefill, "step_seconds": steps}


def summarize(
    runs: list[dict[str, Any]], bounds: Bounds, options: argparse.Namespace
) -> dict[str, Any]:
    """Medians, spreads and bounds, times in milliseconds."""
    prefill = statistics.median(run["prefill_seconds"] for run in runs)
    prefill_bound = bounds.prefill([options.input_len] * options.batch_size)
    num_input = options.input_len * options.batch_size
    result: dict[str, Any] = {
        "prefill_ms": prefill * 1e3,
        "prefill_tokens_per_second": num_input / prefill,
        "prefill_bound_ms": prefill_bound.seconds * 1e3,
        "prefill_limit": prefill_bound.limit,
        "prefill_of_bound": prefill_bound.seconds / prefill,
    }
    steps = [step for run in runs for step in run["step_seconds"]]
    if not steps:
        return result
    context = options.batch_size * (options.input_len + options.output_len // 2)
    bound = bounds.decode(options.batch_size, context)
    step = statistics.median(steps)
    return result | {
        "decode_step_ms": asdict(Spread.of(steps)),
        "decode_tokens_per_second": options.batch_size / step,
        "decode_bound_ms": bound.seconds * 1e3,
        "decode_limit": bound.limit,
        "decode_of_bound": bound.seconds / step,
    }


def show_profile(folder: Path) -> str:
    """What --profile found on rank 0, if there were steps enough."""
    file = folder / "decode-rank0.txt"
    if not (folder / "trace-rank0.json").is_file():
        return f"--profile: too few decode steps for a profile: raise --output-len ({folder})"
    return f"\n{file.read_text()}More in {folder}, one trace a rank for https://ui.perfetto.dev\n"


def format_result(result: dict[str, Any]) -> list[str]:
    """The same for readers."""
    lines = [
        f"prefill of {result['batch_size']} x {result['input_len']}: "
        f"{result['prefill_ms']:.1f} ms, {result['prefill_tokens_per_second']:.0f} tokens/s; bound "
        f"{result['prefill_bound_ms']:.1f} ms ({result['prefill_limit']}), "
        f"{result['prefill_of_bound']:.0%} of it reached"
    ]
    if "decode_step_ms" not in result:
        return lines
    step = result["decode_step_ms"]
    return [
        *lines,
        f"decode step of {result['batch_size']}: P50 {step['p50']:.2f} ms, P90 {step['p90']:.2f}, "
        f"P99 {step['p99']:.2f}, mean {step['mean']:.2f}; "
        f"{result['decode_tokens_per_second']:.1f} tokens/s; bound "
        f"{result['decode_bound_ms']:.2f} ms ({result['decode_limit']}), "
        f"{result['decode_of_bound']:.0%} of it reached",
    ]


if __name__ == "__main__":
    run_script(main)

"""What LoRA adapters cost a step, offline: the same requests without and with them in turns. Every
rank.

    python -m benchmarks.adapters --model FOLDER --load-format dummy
    mpirun -np 2 python -m benchmarks.adapters --model FOLDER --load-format dummy --rank 16

Random adapters of --targets are written to a temporary folder, one for each of --streams requests,
which decode side by side. Every flag of serving.py works too. Each line is a pair of runs: the
median and the quickest of their decode steps; the last line is JSON. Where other programs take
turns on the cores, --cpu-time with OMP_NUM_THREADS=1 counts what the step itself takes of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from autotp_serving import LLM, SamplingParams
from autotp_serving.config import ConfigError
from autotp_serving.distributed.launch import GroupFailure, LaunchError, is_first_rank
from autotp_serving.request import AdapterError, RequestError
from benchmarks.offline import (
    add_flag,
    make_prompt,
    parse_serving_flags,
    positive,
    run_script,
    settings_of,
)

NAME = "benchmarks.adapters"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARM_STEPS = 4


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    # fmt: off
    add_flag(parser, "rank", type=positive, default=8, help="of each adapter (8)")
    add_flag(parser, "targets", nargs="+", default=list(TARGETS), metavar="NAME",
             help=f"linear layers that they adapt ({' '.join(TARGETS)})")
    add_flag(parser, "streams", type=positive, default=8,
             help="requests side by side, each with an adapter of its own (8)")
    add_flag(parser, "input-len", type=positive, default=32, help="tokens of random prompts (32)")
    add_flag(parser, "output-len", type=positive, default=32, help="tokens of answers (32)")
    add_flag(parser, "cpu-time", action="store_true", help="count processor time (wall time)")
    add_flag(parser, "pairs", type=positive, default=5, help="pairs of runs (5)")
    # fmt: on
    return parser


def write_adapters(model_path: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Save random adapters as PEFT does; the words of --lora-modules."""
    config = AutoConfig.from_pretrained(model_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in options.targets
    }
    generator = torch.Generator().manual_seed(0)
    modules = []
    for number in range(options.streams):
        tensors = {}
        for name, linear in linears.items():
            for matrix, shape in (
                ("A", (options.rank, linear.in_features)),
                ("B", (linear.out_features, options.rank)),
            ):
                values = 0.02 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.{name}.lora_{matrix}.weight"] = values.bfloat16()
        own = folder / str(number)
        own.mkdir()
        save_file(tensors, own / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": options.rank, "lora_alpha": options.rank}
        (own / "adapter_config.json").write_text(json.dumps(settings))
        modules.append(f"adapter-{number}={own}")
    return modules


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 when it cannot start."""
    options, rest = build_parser().parse_known_args(argv)
    try:
        config = parse_serving_flags(rest, NAME)
        with tempfile.TemporaryDirectory() as folder:
            modules = []
            if is_first_rank(os.environ):  # which alone reads them
                modules = write_adapters(config.model_path, options, Path(folder))
            config = replace(
                config,
                enable_lora=True,
                max_loras=options.streams,
                max_lora_rank=options.rank,
                max_num_seqs=max(options.streams, config.max_num_seqs),
                speculative_tokens=0,
            )
            with LLM(config.model_path, **settings_of(config)) as llm:
                for name, _, path in (one.partition("=") for one in modules):
                    llm.load_adapter(name, path)
                results = run(llm, options)
    except (AdapterError, ConfigError, GroupFailure, LaunchError, RequestError) as error:
        if is_first_rank(os.environ):
            print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    setup = {"rank": options.rank, "targets": options.targets, "streams": options.streams}
    print(json.dumps({"model": config.model_path, **setup, **results}))
    return 0


def run(llm: LLM, options: argparse.Namespace) -> dict[str, Any]:
    """Warm up, then time pairs of runs."""
    rng = random.Random(0)
    size = llm.tokenizer.vocab_size
    prompts = [make_prompt(rng, options.input_len, size) for _ in range(options.streams)]
    names = [f"adapter-{number}" for number in range(options.streams)]
    clock = time.process_time if options.cpu_time else time.perf_counter
    time_steps(llm, prompts, names, WARM_STEPS, clock)
    pairs = []
    for number in range(options.pairs):
        found = {}
        kinds: list[tuple[str, Sequence[str | None]]] = [
            ("without", [None] * len(names)), ("with", names)
        ]  # fmt: skip
        for kind, adapters in kinds if number % 2 else kinds[::-1]:
            found[kind] = time_steps(llm, prompts, adapters, options.output_len, clock)
        pairs.append((found["without"], found["with"]))
        medians, bests = (
            [1e3 * pick(steps) for steps in pairs[-1]] for pick in (statistics.median, min)
        )
        print(
            f"{options.streams} adapters of rank {options.rank}: median step {medians[0]:.2f} -> "
            f"{medians[1]:.2f} ms (x {medians[1] / medians[0]:.3f}), quickest {bests[0]:.2f} -> "
            f"{bests[1]:.2f} ms (x {bests[1] / bests[0]:.3f})",
            flush=True,
        )
    quickest = [min(min(pair[index]) for pair in pairs) for index in (0, 1)]
    ratios = [statistics.median(pair[1]) / statistics.median(pair[0]) for pair in pairs]
    return {
        "ratio_of_medians": statistics.median(ratios),
        "ratio_of_quickest": quickest[1] / quickest[0],
        "quickest_step_ms": [1e3 * seconds for seconds in quickest],
    }


def time_steps(
    llm: LLM,
    prompts: Sequence[list[int]],
    adapters: Sequence[str | None],
    output_len: int,
    clock: Callable[[], float],
) -> list[float]:
    """Seconds of each decode step of all prompts side by side."""
    steps: list[float] = []
    step = llm._engine.step

    def timed_step() -> None:
        started = clock()
        step()
        steps.append(clock() - started)

    llm._engine.step = timed_step
    try:
        params = SamplingParams(max_tokens=output_len, ignore_eos=True)
        llm.generate(prompts, params, adapter=adapters, show_progress=False)
    finally:
        llm._engine.step = step
    return steps[min(WARM_STEPS, len(steps) - 1) :]


if __name__ == "__main__":
    run_script(main)

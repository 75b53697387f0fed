"""Our pass beside transformers' own `generate`: one prompt at a time, in turns. One rank, on CPU.

    python scripts/make_random_checkpoint.py qwen3.5-0.8b /tmp/qwen
    python -m benchmarks.beside_transformers --model /tmp/qwen --input-len 256 --output-len 32

Both models are in memory, in the same type (`--dtype`, BF16), and run the same prompts in one
process, which takes turns: what else the machine does slows both. The prefill lasts until the
first token; a decode step is the median of those that follow. Beside seconds by the clock stand
seconds of processor time, which are steadier on a machine that is shared. Other flags are
serving.py's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

from autotp_serving import SamplingParams
from autotp_serving.config import ConfigError
from autotp_serving.request import RequestError
from benchmarks.latency import split_run
from benchmarks.offline import (
    TimedLLM,
    add_flag,
    make_prompt,
    parse_serving_flags,
    positive,
    run_script,
    settings_of,
)

NAME = "benchmarks.beside_transformers"
FIGURES = ("prefill_seconds", "step_seconds", "processor_seconds")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add_flag(parser, "input-len", type=positive, default=256, help="tokens of a prompt (256)")
    add_flag(parser, "output-len", type=positive, default=32, help="tokens of an answer (32)")
    add_flag(parser, "num-iters", type=positive, default=3, help="turns of each (3)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 when it cannot start."""
    options, rest = build_parser().parse_known_args(argv)
    words = ["--low-bit", "bf16", "--device", "cpu", "--no-enable-prefix-caching"]
    words += ["--dtype", "bfloat16", "--speculative-tokens", "0", *rest]
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
    try:
        config = parse_serving_flags(words, NAME)
        with TimedLLM(config.model_path, **settings_of(config)) as llm:
            model = load_transformers(config.model_path, config.dtype)
            rng = random.Random(0)
            for turn in range(options.num_iters + 1):  # the first one warms up
                prompt = make_prompt(rng, options.input_len, llm.tokenizer.vocab_size)
                found = {
                    "ours": run_ours(llm, prompt, options.output_len),
                    "transformers": run_transformers(model, prompt, options.output_len),
                }
                for name, run in found.items():
                    if turn:
                        runs[name].append(run)
    except (ConfigError, RequestError, OSError) as error:
        print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    medians = {
        name: {figure: statistics.median(run[figure] for run in turns) for figure in FIGURES}
        for name, turns in runs.items()
    }
    for figure in FIGURES:
        ours, theirs = (medians[name][figure] for name in ("ours", "transformers"))
        print(
            f"{figure.removesuffix('_seconds')}: ours {ours * 1e3:.1f} ms, transformers "
            f"{theirs * 1e3:.1f} ms, {theirs / ours:.2f} times as long"
        )
    print(json.dumps({"model": config.model_path, **vars(options), **medians}))
    return 0


def load_transformers(model_path: str, dtype: str) -> Any:
    """Transformers' model; ours has sampled nothing of it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def run_ours(llm: TimedLLM, prompt: list[int], num_tokens: int) -> dict[str, float]:
    """Seconds of one answer."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    llm.arrivals.clear()
    started, used = time.perf_counter(), time.process_time()
    llm.generate([prompt], params, show_progress=False)
    return describe(started, used, [moment for moment, _ in llm.arrivals])


def run_transformers(model: Any, prompt: list[int], num_tokens: int) -> dict[str, float]:
    """The same of transformers."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    moments: list[float] = []

    class Clock(BaseStreamer):
        def put(self, value: Any) -> None:
            moments.append(time.perf_counter())

        def end(self) -> None:
            """Nothing is left to show."""

    ids = torch.tensor([prompt])
    started, used = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            streamer=Clock(),
        )
    return describe(started, used, moments[1:])  # the first is the prompt


def describe(started: float, used: float, moments: list[float]) -> dict[str, float]:
    """Seconds of the prefill, of a decode step, and of the processors for both together."""
    used = time.process_time() - used
    run = split_run(started, [(moment, ("one",)) for moment in moments], 1)
    return {
        "prefill_seconds": run["prefill_seconds"],
        "step_seconds": statistics.median(run["step_seconds"] or [0.0]),
        "processor_seconds": used,
    }


if __name__ == "__main__":
    run_script(main)

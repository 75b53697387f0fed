"""Our pass beside transformers' own `generate`: one prompt at a time, in turns. One rank, on CPU.

    python scripts/make_random_checkpoint.py qwen3.5-0.8b /tmp/qwen
    python -m benchmarks.beside_transformers --model /tmp/qwen --input-len 256 --output-len 32

Both models are in memory, in the same type (`--dtype`, BF16), and run the same prompts in one
process, which takes turns: what else the machine does slows both. The prefill lasts until the
first token; a decode step is the median of those that follow. Beside time by the clock stands
that of the processors, which is steadier on a machine that is shared. Other flags are serving.py's.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

from autotp_serving import LLM, SamplingParams
from autotp_serving.config import ConfigError
from autotp_serving.request import RequestError, RequestOutput
from benchmarks.offline import (
    add_flag,
    make_prompt,
    parse_serving_flags,
    positive,
    run_script,
    settings_of,
)

NAME = "benchmarks.beside_transformers"
FIGURES = ("prefill_seconds", "step_seconds", "prefill_processor_seconds", "step_processor_seconds")

Moment = tuple[float, float]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add_flag(parser, "input-len", type=positive, default=256, help="tokens of a prompt (256)")
    add_flag(parser, "output-len", type=at_least_two, default=32, help="tokens of an answer (32)")
    add_flag(parser, "num-iters", type=positive, default=3, help="turns of each (3)")
    return parser


def at_least_two(text: str) -> int:
    """For argparse: a decode step follows the first token."""
    if positive(text) < 2:
        raise argparse.ArgumentTypeError("must be at least 2: the first token is the prefill's")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 when it cannot start."""
    options, rest = build_parser().parse_known_args(argv)
    words = ["--low-bit", "bf16", "--device", "cpu", "--no-enable-prefix-caching"]
    words += ["--dtype", "bfloat16", "--speculative-tokens", "0", *rest]
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
    try:
        config = parse_serving_flags(words, NAME)
        with ClockedLLM(config.model_path, **settings_of(config)) as llm:
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
        what = figure.removesuffix("_seconds").replace("_", ", ")
        print(
            f"{what}: ours {ours * 1e3:.1f} ms, transformers {theirs * 1e3:.1f} ms, "
            f"{theirs / ours:.2f} times as long"
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


class ClockedLLM(LLM):
    """Notes the time of each token.

    Attributes:
        moments: see `describe`.
    """

    def __init__(self, model_path: str, **settings: Any) -> None:
        self.moments: list[Moment] = []
        super().__init__(model_path, **settings)

    def _collect(self, outputs: list[RequestOutput]) -> None:
        if any(output.token_ids for output in outputs):
            self.moments.append(read_clocks())
        super()._collect(outputs)


def run_ours(llm: ClockedLLM, prompt: list[int], num_tokens: int) -> dict[str, float]:
    """Seconds of one answer."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    llm.moments = [read_clocks()]
    llm.generate([prompt], params, show_progress=False)
    return describe(llm.moments)


def run_transformers(model: Any, prompt: list[int], num_tokens: int) -> dict[str, float]:
    """The same of transformers."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    moments: list[Moment] = []

    class Clock(BaseStreamer):
        def put(self, value: Any) -> None:
            moments.append(read_clocks())  # first for the prompt, before anything is computed

        def end(self) -> None:
            """Nothing is left to show."""

    ids = torch.tensor([prompt])
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            streamer=Clock(),
        )
    return describe(moments)


def read_clocks() -> Moment:
    """Seconds by the clock, and of this process on all processors."""
    return time.perf_counter(), time.process_time()


def describe(moments: list[Moment]) -> dict[str, float]:
    """Seconds of the prefill and of a decode step, by both clocks.

    Args:
        moments: the beginning, and when each token came.
    """
    spans = [
        [after - before for before, after in pairwise(times)]
        for times in zip(*moments, strict=True)
    ]
    prefills = [span[0] for span in spans]
    steps = [statistics.median(span[1:]) for span in spans]
    return dict(zip(FIGURES, [prefills[0], steps[0], prefills[1], steps[1]], strict=True))


if __name__ == "__main__":
    run_script(main)

"""The engine in a script, timed: shared by benchmarks/latency.py and benchmarks/throughput.py.

Every rank runs these files; what is measured and printed is rank 0's.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from autotp_serving import LLM
from autotp_serving.command_line import parse_args
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.devices import open_device
from autotp_serving.distributed.launch import join_group
from autotp_serving.request import RequestOutput
from benchmarks.bound import Bounds, find_costs
from benchmarks.hardware import Hardware, measure_hardware

# How upstream's guides spell what the server calls otherwise.
OTHER_NAMES = {"--load-in-low-bit": "--low-bit", "-tp": "--tensor-parallel-size"}
# Flags of those guides that ask for what is the case anyway.
ALWAYS_SO = {
    "--enable-chunked-prefill": "long prompts always run in chunks",
}
REFUSED = {
    "--plan": "that is serving.py's",
    "--save-low-bit": "that is serving.py's",
    "--quantization": "use --low-bit FORMAT",
    "-q": "use --low-bit FORMAT",
    "--tokenizer": "the tokenizer is the one in the model's folder",
    "--download-dir": "nothing is downloaded: name a folder with --model",
    "--use-beam-search": "there is no beam search",
    "--async-engine": "to measure through HTTP use benchmark.py",
    "--disable-detokenize": "the time of the text is part of the work",
    "--num-scheduler-steps": "a step gives each sequence one token",
    "--swap-space": "name a folder with --kv-offload-dir",
}


def parse_serving_flags(words: Sequence[str], name: str) -> ServingConfig:
    """The rest of a command line as the server reads it; every flag of serving.py works.

    Raises:
        ConfigError: a flag that the server lacks, or one that cannot be honoured.
    """
    kept = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in REFUSED:
            raise ConfigError(f"{flag} is not supported: {REFUSED[flag]}")
        if flag in ALWAYS_SO:
            if int(os.environ.get("PMI_RANK", "0")) == 0:
                print(f"{name}: {flag} changes nothing: {ALWAYS_SO[flag]}")
            continue
        kept.append(OTHER_NAMES.get(flag, flag) + equals + value)
    return parse_args(kept)


def run_script(main: Callable[[], int]) -> None:
    """Run a rank's `main` and exit; a rank that fails takes the others along."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        join_group(os.environ).abort()
        code = 1
    sys.exit(code)


def add_flag(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """Declare a flag that may be spelt with hyphens or underscores."""
    names = dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"])
    parser.add_argument(*names, **{"dest": name.replace("-", "_")} | options)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def settings_of(config: ServingConfig) -> dict[str, Any]:
    """The fields of a config as LLM takes them."""
    settings = dict(vars(config))
    del settings["model_path"]
    return settings


def measure_bounds(config: ServingConfig) -> tuple[Bounds | None, Hardware]:
    """All ranks: measure the machine. Bounds on rank 0, None on the others."""
    group = join_group(os.environ)
    device = open_device(config.device, group.local_rank)
    hardware = measure_hardware(group, device)
    if group.rank:
        return None, hardware
    low_bit = config.low_bit not in ("bf16", "fp16")
    return Bounds(find_costs(config), hardware, low_bit=low_bit), hardware


def make_prompt(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    """Random token ids; the first few hundred, special ones among them, are left out."""
    return [rng.randrange(min(300, vocab_size // 2), vocab_size) for _ in range(length)]


class TimedLLM(LLM):
    """Remembers when each token came.

    Attributes:
        arrivals: per step that gave tokens: the time, and the requests that got one.
    """

    def __init__(self, model_path: str, **settings: Any) -> None:
        self.arrivals: list[tuple[float, tuple[str, ...]]] = []
        super().__init__(model_path, **settings)

    def _collect(self, outputs: list[RequestOutput]) -> None:
        now = time.perf_counter()
        ids = tuple(output.request_id for output in outputs if output.token_ids)
        if ids:
            self.arrivals.append((now, ids))
        super()._collect(outputs)

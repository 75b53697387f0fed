"""The next turn of a chat after a restart: with the KV blocks in files, and computed again. Every
rank.

    python -m benchmarks.chat_restart --model demo_model --low-bit bf16 --kv-offload-dir FOLDER

A chat of --turns turns, random tokens and the model's answers to them; then the server begins anew
and is asked once more. That is done without the folder and with it, which must be new or empty.
Every flag of serving.py works too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotp_serving import LLM, SamplingParams
from autotp_serving.config import DEFAULT_OFFLOAD_SIZE, ConfigError, ServingConfig
from autotp_serving.distributed.launch import GroupFailure, LaunchError, is_first_rank
from autotp_serving.request import RequestError
from benchmarks.offline import (
    add_flag,
    make_prompt,
    parse_serving_flags,
    positive,
    run_script,
    settings_of,
)

NAME = "benchmarks.chat_restart"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add_flag(parser, "turns", type=positive, default=20, help="before the restart (20)")
    add_flag(parser, "input-len", type=positive, default=64, help="tokens of a question (64)")
    add_flag(parser, "output-len", type=positive, default=32, help="tokens of an answer (32)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 when it cannot start."""
    options, rest = build_parser().parse_known_args(argv)
    try:
        config = parse_serving_flags(rest, NAME)
        folder = config.kv_offload_dir
        if folder is None or (Path(folder).exists() and any(Path(folder).iterdir())):
            raise ConfigError("--kv-offload-dir must name a folder that is new or empty")
        size = {"kv_offload_size": DEFAULT_OFFLOAD_SIZE}
        computed = compare(replace(config, kv_offload_dir=None, **size), options)
        loaded = compare(config, options)
    except (ConfigError, GroupFailure, LaunchError, RequestError, OSError) as error:
        if is_first_rank(os.environ):
            print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    if computed and loaded:
        assert computed["answer"] == loaded["answer"], "the files changed an answer"
        seconds = computed["first_token_seconds"], loaded["first_token_seconds"]
        print(f"first token after a restart: {seconds[0]:.3f} s -> {seconds[1]:.3f} s, "
              f"{seconds[0] / seconds[1]:.1f} times sooner")  # fmt: skip
        print(json.dumps({"model": config.model_path, "computed": computed, "loaded": loaded}))
    return 0


def compare(config: ServingConfig, options: argparse.Namespace) -> dict[str, Any] | None:
    """Chat, begin anew, ask once more; nothing on ranks other than 0."""
    rng = random.Random(0)
    chat: list[int] = []
    result: dict[str, Any] = {}
    params = SamplingParams(max_tokens=options.output_len, temperature=0.0, ignore_eos=True)
    try:
        with LLM(config.model_path, **settings_of(config)) as llm:
            size = llm.tokenizer.vocab_size
            llm.generate([make_prompt(rng, 16, size)], params, show_progress=False)
            started = time.perf_counter()
            for _ in range(options.turns):
                chat += make_prompt(rng, options.input_len, size)
                chat += llm.generate([chat], params, show_progress=False)[0].token_ids
            result["chat_seconds"] = time.perf_counter() - started
        with LLM(config.model_path, **settings_of(config)) as llm:
            llm.generate([make_prompt(rng, 16, size)], params, show_progress=False)
            chat += make_prompt(rng, options.input_len, size)
            started = time.perf_counter()
            first = replace(params, max_tokens=1)
            llm.generate([chat], first, show_progress=False)
            result["first_token_seconds"] = time.perf_counter() - started
            result["num_prompt_tokens"] = len(chat)
            result["num_cached_tokens"] = llm._engine.scheduler.num_prefix_hit_tokens
            result["answer"] = llm.generate([chat], params, show_progress=False)[0].token_ids
    except SystemExit:  # how a rank other than 0 leaves LLM
        return None
    where = "computed again" if config.kv_offload_dir is None else "from files"
    print(f"{where}: {options.turns} turns in {result['chat_seconds']:.2f} s, then "
          f"{result['num_cached_tokens']} of {len(chat)} tokens known, first token after "
          f"{result['first_token_seconds']:.3f} s", flush=True)  # fmt: skip
    return result


if __name__ == "__main__":
    run_script(main)

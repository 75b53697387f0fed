"""Many prompts, offline: tokens per second from the first to the last. Every rank.

    python -m benchmarks.throughput --model demo_model --input-len 512 --output-len 64
    mpirun -np 2 python -m benchmarks.throughput --model MODEL --dataset ShareGPT.json \\
        --num-prompts 200 --load-in-low-bit sym_int4
    python -m benchmarks.throughput --backend hf --hf-max-batch-size 8 --model demo_model

Prompts are random tokens of given lengths, or come from a dataset file: ShareGPT's .json, .jsonl
with "prompt", or .txt by lines. Every flag of serving.py works too, and the spellings of
benchmark_vllm_throughput.py do or are refused by name. Beside the figure stands the least time
that this machine needs for the same work, and the fraction of it that was reached. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autotp_serving import LLM, SamplingParams
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.distributed.launch import GroupFailure, LaunchError, is_first_rank, join_group
from autotp_serving.engine.tokenizer import HuggingFaceTokenizer
from autotp_serving.request import RequestError
from benchmarks.offline import (
    add_flag,
    make_prompt,
    measure_bounds,
    parse_serving_flags,
    positive,
    run_script,
    settings_of,
)
from benchmarks.prompts import PromptError, read_dataset

NAME = "benchmarks.throughput"
OTHER_BACKENDS = {
    "vllm": "python -m benchmarks.peers vllm_cpu runs vLLM beside this server",
    "vllm-chat": "python -m benchmarks.peers vllm_cpu runs vLLM beside this server",
    "mii": "DeepSpeed-MII is not among the peers",
}
DEFAULT_OUTPUT_LEN = 128


@dataclass(frozen=True)
class Job:
    """One prompt and how many tokens to answer with."""

    prompt: list[int]
    output_len: int


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    # fmt: off
    add_flag(parser, "backend", default="ours", metavar="ours|hf",
             help="ours, or hf: transformers' generate in bfloat16 (ours)")
    add_flag(parser, "dataset", type=Path, metavar="FILE", help="prompts from a file")
    add_flag(parser, "dataset-path", dest="dataset", type=Path, metavar="FILE",
             help="another name for --dataset")
    add_flag(parser, "dataset-name", choices=("random", "sharegpt"),
             help="not needed: a file is read by its kind, and without one prompts are random")
    for name in ("input-len", "random-input-len"):
        add_flag(parser, name, dest="input_len", type=positive, metavar="TOKENS",
                 help="tokens of random prompts (1024)")
    for name in ("output-len", "random-output-len"):
        add_flag(parser, name, dest="output_len", type=positive, metavar="TOKENS",
                 help="tokens of each answer (128; a dataset's own lengths where it has them)")
    add_flag(parser, "random-range-ratio", type=float, default=0.0, metavar="SHARE",
             help="random lengths lie within this share around the given ones, 0 to 1 (0)")
    add_flag(parser, "num-prompts", type=positive, metavar="N", help="how many (32)")
    add_flag(parser, "n", type=positive, default=1, help="answers to each prompt (1)")
    add_flag(parser, "temperature", type=float, default=0.0, help="0 is greedy (0)")
    add_flag(parser, "hf-max-batch-size", type=positive, metavar="N",
             help="with --backend hf: prompts in a batch; must be given")
    add_flag(parser, "output-json", type=Path, metavar="FILE", help="write the JSON here as well")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 2 when it cannot start."""
    options, rest = build_parser().parse_known_args(argv)
    try:
        config = parse_serving_flags(rest, NAME)
        check_options(options, config)
        if options.backend == "hf":
            config = replace(config, low_bit="bf16")
        tokenizer = HuggingFaceTokenizer(
            Path(config.model_path), trust_remote_code=config.trust_remote_code
        )
        jobs = make_jobs(options, tokenizer, config)
        bounds, hardware = measure_bounds(config)
        run = run_hf if options.backend == "hf" else run_ours
        seconds = run(config, options, jobs)
    except (
        ConfigError, GroupFailure, LaunchError, PromptError, RequestError, OSError,
    ) as error:  # fmt: skip
        if is_first_rank(os.environ):
            print(f"{NAME}: error: {error}", file=sys.stderr)
        return 2
    assert bounds is not None  # the other ranks never come here
    width = options.hf_max_batch_size or config.max_num_seqs
    bound = bounds.whole_job([(len(job.prompt), job.output_len) for job in jobs], width)
    num_input = sum(len(job.prompt) for job in jobs)
    num_output = sum(job.output_len for job in jobs)
    result = {
        "backend": options.backend,
        "model": config.model_path,
        "low_bit": config.low_bit or "default",
        "num_requests": len(jobs),
        "elapsed_time": seconds,
        "total_num_tokens": num_input + num_output,
        "requests_per_second": len(jobs) / seconds,
        "tokens_per_second": (num_input + num_output) / seconds,
        "output_tokens_per_second": num_output / seconds,
        "bound_seconds": bound.seconds,
        "bound_limit": bound.limit,
        "of_bound": bound.seconds / seconds,
        "hardware": asdict(hardware),
    }
    print(hardware.describe())
    print(
        f"Throughput: {len(jobs) / seconds:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, "
        f"{result['output_tokens_per_second']:.2f} output tokens/s"
    )
    print(
        f"{seconds:.1f} s for {num_input} + {num_output} tokens; bound {bound.seconds:.1f} s "
        f"({bound.limit}, {width} sequences a step), {result['of_bound']:.0%} of it reached"
    )
    if options.output_json is not None:
        options.output_json.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))
    return 0


def check_options(options: argparse.Namespace, config: ServingConfig) -> None:
    """Raise ConfigError for what cannot be honoured."""
    if options.backend in OTHER_BACKENDS:
        raise ConfigError(
            f"--backend {options.backend}: {OTHER_BACKENDS[options.backend]}; here: ours, hf"
        )
    if options.backend not in ("ours", "hf"):
        raise ConfigError(f"--backend must be ours or hf, not {options.backend}")
    if not 0.0 <= options.random_range_ratio < 1.0:
        raise ConfigError(
            f"--random-range-ratio must be at least 0 and below 1, not {options.random_range_ratio}"
        )
    if options.dataset is not None:
        for name in ("input_len", "random_range_ratio"):
            if getattr(options, name):
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is for random prompts: leave out --dataset")
    if options.dataset_name == "sharegpt" and options.dataset is None:
        raise ConfigError("--dataset-name sharegpt needs the file: --dataset FILE")
    if options.dataset_name == "random" and options.dataset is not None:
        raise ConfigError("--dataset-name random takes no file: leave out --dataset")
    if options.backend == "ours":
        if options.hf_max_batch_size is not None:
            raise ConfigError("--hf-max-batch-size is for --backend hf; here: --max-num-seqs")
        return
    if options.hf_max_batch_size is None:
        raise ConfigError("--backend hf needs --hf-max-batch-size")
    if config.low_bit not in (None, "bf16"):
        raise ConfigError(f"--backend hf has no --low-bit {config.low_bit}: it runs bf16")
    if join_group(os.environ).size > 1:
        raise ConfigError("--backend hf runs in one process: start it without mpirun")
    if options.temperature:
        raise ConfigError("--backend hf is greedy: leave out --temperature")


def make_jobs(options: argparse.Namespace, tokenizer: Any, config: ServingConfig) -> list[Job]:
    """The same on every rank and at every call with the same seed."""
    rng = random.Random(config.seed)
    if options.dataset is not None:
        jobs = read_jobs(options, tokenizer, rng)
    else:
        jobs = []
        for _ in range(options.num_prompts or 32):
            lengths = [
                max(1, round(length * (1 + options.random_range_ratio * rng.uniform(-1, 1))))
                for length in (options.input_len or 1024, options.output_len or DEFAULT_OUTPUT_LEN)
            ]
            jobs.append(Job(make_prompt(rng, lengths[0], tokenizer.vocab_size), lengths[1]))
    return [job for job in jobs for _ in range(options.n)]


def read_jobs(options: argparse.Namespace, tokenizer: Any, rng: random.Random) -> list[Job]:
    """Prompts of a file in random order, each with the length of its own answer if it has one.

    As upstream does it, ShareGPT's very short and very long ones are left out.
    """
    prompts = read_dataset(options.dataset, options.output_len or 0)
    rng.shuffle(prompts)
    wanted = options.num_prompts or len(prompts)
    jobs: list[Job] = []
    for prompt in prompts:
        if len(jobs) == wanted:
            break
        ids = tokenizer.encode(prompt.text)
        length = options.output_len or prompt.max_new_tokens or DEFAULT_OUTPUT_LEN
        if prompt.answer is not None:
            if not options.output_len:
                length = len(tokenizer.encode(prompt.answer, add_special_tokens=False))
            if len(ids) < 4 or length < 4 or len(ids) > 1024 or len(ids) + length > 2048:
                continue
        jobs.append(Job(ids, length))
    if not jobs:
        raise PromptError(f"--dataset {options.dataset}: no prompt of a usable length")
    if len(jobs) < wanted and is_first_rank(os.environ):
        print(f"{NAME}: the dataset has {len(jobs)} usable prompts, fewer than {wanted}")
    return jobs


def run_ours(config: ServingConfig, options: argparse.Namespace, jobs: list[Job]) -> float:
    """Seconds for all jobs; raises ConfigError when one of them failed."""
    # All may wait at once: the queue's limit is for clients.
    settings = settings_of(replace(config, max_queue_len=max(config.max_queue_len, len(jobs))))
    params = [
        SamplingParams(max_tokens=job.output_len, temperature=options.temperature, ignore_eos=True)
        for job in jobs
    ]
    with LLM(config.model_path, **settings) as llm:
        warm = SamplingParams(max_tokens=4, ignore_eos=True)
        llm.generate([job.prompt[:64] for job in jobs[:2]], warm, show_progress=False)
        started = time.perf_counter()
        answers = llm.generate([job.prompt for job in jobs], params)
        seconds = time.perf_counter() - started
    for job, answer in zip(jobs, answers, strict=True):
        if len(answer.token_ids) != job.output_len:
            reason = answer.error or answer.finish_reason
            raise ConfigError(
                f"a request brought {len(answer.token_ids)} of {job.output_len} tokens: {reason}"
            )
    return seconds


def run_hf(config: ServingConfig, options: argparse.Namespace, jobs: list[Job]) -> float:
    """The same through transformers, in static batches padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    from autotp_serving.devices import open_device

    device = open_device(config.device, 0)
    model = AutoModelForCausalLM.from_pretrained(
        config.model_path, dtype=torch.bfloat16, trust_remote_code=config.trust_remote_code
    )
    model = model.to(device.torch_device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(batch: list[Job], num_tokens: int) -> None:
        width = max(len(job.prompt) for job in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, job in enumerate(batch):
            ids[row, width - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[row, width - len(job.prompt) :] = 1
        with torch.inference_mode():
            model.generate(
                ids.to(device.torch_device),
                attention_mask=mask.to(device.torch_device),
                max_new_tokens=num_tokens,
                do_sample=False,
            )

    size = options.hf_max_batch_size
    generate(jobs[:1], 2)
    started = time.perf_counter()
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        generate(batch, max(job.output_len for job in batch))
    device.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    run_script(main)

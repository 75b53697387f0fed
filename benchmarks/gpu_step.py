"""Whole steps of a model on one CUDA card, beside what its copy rate and matrix rate allow.

    python -m benchmarks.gpu_step --low-bit bf16 sym_int4 fp8_e4m3
    python -m benchmarks.gpu_step --tokens answers.json --model demo_model --low-bit bf16 sym_int4

Weights are random numbers drawn on the card, in the shape of Llama-2-7B unless --model names a
folder; only with --tokens are they the folder's own. Decode steps are timed at a context of 1,060
tokens: as the card runs a graph again and again, and as the host sees a step with its greedy token
read back; prompts as the card runs them one after another, and as the host sees one. With --tokens,
greedy answers on the card are compared with the CPU's, with graphs and without; the CPU's are kept
in the file.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from autotp_serving import LLM, SamplingParams
from autotp_serving.batch import Batch
from autotp_serving.config import ServingConfig
from autotp_serving.devices import open_device
from autotp_serving.distributed.launch import join_group
from autotp_serving.model import loader
from autotp_serving.model.dummy import WEIGHT_STD, DummyCheckpoint
from autotp_serving.worker.worker import Worker, start_worker
from benchmarks.bound import Bounds, find_costs
from benchmarks.hardware import measure_hardware

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONTEXT = 1060


class DrawnCheckpoint(DummyCheckpoint):
    """The same shapes; the numbers are drawn on the card, which takes no time."""

    def read(self, name: str, ranges: Any, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """See DummyCheckpoint."""
        sizes = [stop - start for start, stop in ranges]
        if "norm" in name or len(sizes) < 2 or name.endswith("bias"):
            return super().read(name, ranges, dtype)
        return (torch.randn(sizes, device="cuda") * WEIGHT_STD).bfloat16().to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder with a config.json")
    parser.add_argument("--low-bit", nargs="+", default=["bf16", "sym_int4", "fp8_e4m3"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--prompts", nargs="+", type=int, default=[1, 4], help="of 1,024 tokens")
    parser.add_argument("--trace", action="store_true", help="show the time of each kernel")
    parser.add_argument("--tokens", type=Path, help="file for the CPU's greedy answers")
    parser.add_argument("--logits", action="store_true", help="compare the CPU's with the card's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or folder
        if options.tokens is not None:
            compare_tokens(model, options.tokens, options.low_bit)
            return
        if options.logits:
            with torch.inference_mode():
                compare_logits(model, options.low_bit)
            return
        if options.model is None:
            (Path(folder) / "config.json").write_text(json.dumps(LLAMA_2_7B))
        loader.DummyCheckpoint = DrawnCheckpoint
        print(torch.cuda.get_device_name(), torch.__version__, flush=True)
        for low_bit in options.low_bit:
            config = ServingConfig(
                model_path=model,
                low_bit=low_bit,
                load_format="dummy",
                device="cuda",
                max_num_seqs=max(options.batch_sizes),
                max_model_len=2048,
                max_num_batched_tokens=max(4096, 1024 * max(options.prompts)),
            )
            try:
                measure(config, options)
            except Exception:
                traceback.print_exc()
            torch.cuda.empty_cache()


def measure(config: ServingConfig, options: argparse.Namespace) -> None:
    """Load, then time decode steps and prompts of one format."""
    started = time.perf_counter()
    group = join_group({})
    running = start_worker(config, group)
    torch.cuda.synchronize()
    loaded = time.perf_counter() - started
    hardware = measure_hardware(group, open_device("cuda", 0))
    costs = find_costs(config)
    print(
        f"{config.low_bit}: started in {loaded:.1f} s; {hardware.describe()}; "
        f"weights {(costs.body_bytes + costs.head_bytes) / 1e9:.2f} GB",
        flush=True,
    )
    bounds = Bounds(costs, hardware, low_bit=False)
    for batch_size in options.batch_sizes:
        batch = write_decode(batch_size, config.block_size)
        if max(batch.new_blocks) >= running.cache.num_blocks:
            print(f"{batch_size} contexts do not fit")
            continue
        bound = bounds.decode(batch_size, batch_size * CONTEXT).seconds
        device, host = time_decode(running, batch)
        print(
            f"{config.low_bit} {batch_size:3} streams: {device * 1e3:.3f} ms on the card "
            f"({bound / device:.0%} of the bound {bound * 1e3:.3f}), {host * 1e3:.3f} ms for the "
            f"host ({bound / host:.0%}), {batch_size / host:.0f} tokens/s",
            flush=True,
        )
        if options.trace and batch_size in (1, 8, 64):
            trace(running, batch)
    for num_prompts in options.prompts:
        batch = write_prompts(num_prompts, 1024, config.block_size)
        device, host = time_prefill(running, batch)
        bound = bounds.prefill([1024] * num_prompts).seconds
        print(
            f"{config.low_bit} prefill {num_prompts} x 1024: {device * 1e3:.2f} ms on the card "
            f"({bound / device:.0%} of the bound {bound * 1e3:.2f}, "
            f"{num_prompts * 1024 / device:.0f} tokens/s), {host * 1e3:.2f} ms for the host "
            f"({bound / host:.0%})",
            flush=True,
        )
        if options.trace:
            trace(running, batch)


def make_batch(num_seqs: int, start: int, token_ids: list[int], block_size: int) -> Batch:
    """As many tokens for each of so many sequences, each in blocks of its own."""
    query_len = len(token_ids) // num_seqs
    num_blocks = -(-(start + query_len) // block_size)
    rows = list(range(num_seqs))
    return Batch(
        rows=rows,
        starts=[start] * num_seqs,
        query_lens=[query_len] * num_seqs,
        num_known=[query_len] * num_seqs,
        token_ids=token_ids,
        grown=rows,
        first_blocks=[0] * num_seqs,
        num_new_blocks=[num_blocks] * num_seqs,
        new_blocks=list(range(num_seqs * num_blocks)),
        sampled=rows,
    )


def write_decode(num_seqs: int, block_size: int) -> Batch:
    """One token for each of so many sequences at the end of their contexts."""
    return make_batch(num_seqs, CONTEXT - 1, [100 + seq for seq in range(num_seqs)], block_size)


def write_prompts(num_prompts: int, length: int, block_size: int) -> Batch:
    """So many prompts in one step."""
    rng = random.Random(0)
    tokens = [rng.randrange(300, 8000) for _ in range(num_prompts * length)]
    return make_batch(num_prompts, 0, tokens, block_size)


def time_steps(worker: Worker, batch: Batch, count: int) -> float:
    """Median seconds of a step with its greedy tokens read back."""
    times = []
    for _ in range(count + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        worker.runner.run(batch).find_best(batch.num_seqs)[1].tolist()
        batch = settled(batch)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def settled(batch: Batch) -> Batch:
    """The same step once its blocks are known to the ranks."""
    return replace(batch, grown=[], first_blocks=[], num_new_blocks=[], new_blocks=[])


def time_decode(worker: Worker, batch: Batch) -> tuple[float, float]:
    """Seconds of a decode step: of the card alone, steps back to back; and as the host sees it."""
    host = time_steps(worker, batch, 20)
    forward = worker.runner._forward
    graphs = getattr(forward, "_graphs", {})
    size = next((size for size in graphs if size >= batch.num_seqs), None)
    if size is None:
        return host, host
    graph = graphs[size].graph
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(5):
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e4)
    return statistics.median(times), host


def time_prefill(worker: Worker, batch: Batch) -> tuple[float, float]:
    """The same of prompts: on the card while the host is ahead, as it is when a server is busy."""
    host = time_steps(worker, batch, 5)
    batch = settled(batch)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(3):
        worker.runner.run(batch)  # the host gets ahead meanwhile
        start.record()
        for _ in range(4):
            worker.runner.run(batch)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 4e3)
    return statistics.median(times), host


def trace(worker: Worker, batch: Batch) -> None:
    """Time of each kernel in one step, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        worker.runner.run(batch)
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in profiler.events():
        name = event.name[:60]
        times[name] += event.device_time_total if hasattr(event, "device_time_total") else 0
        counts[name] += 1
    for name, micros in times.most_common(14):
        print(f"    {micros / 1e3:8.3f} ms {counts[name]:5} x {name}")


def compare_tokens(model: str, file: Path, formats: list[str]) -> None:
    """Greedy answers on the CPU, kept in the file, and on a card, compared with those."""
    expected = json.loads(file.read_text()) if file.exists() else {}
    for low_bit in formats:
        if low_bit not in expected:
            expected[low_bit] = answer(model, low_bit, "cpu", "quick")
            file.write_text(json.dumps(expected))
        for how in ("graphs", "eager") if torch.cuda.is_available() else ():
            pairs = list(zip(answer(model, low_bit, "cuda", how), expected[low_bit], strict=True))
            equal = sum(a["ids"] == b["ids"] for a, b in pairs)
            gaps = [
                theirs["gaps"][i]
                for ours, theirs in pairs
                for i in [first_difference(ours["ids"], theirs["ids"])]
                if i is not None and i < len(theirs["gaps"])
            ]
            print(
                f"{low_bit} {how}: {equal} of {len(pairs)} answers equal the CPU's; where others "
                f"part, the CPU's best two lie {[round(gap, 3) for gap in sorted(gaps)]} apart",
                flush=True,
            )


def compare_logits(model: str, formats: list[str]) -> None:
    """The same steps on the CPU and on the card: how far apart all logits lie, relatively.

    A prompt of 300 tokens runs through products of many tokens, one of 60 and single tokens
    through those of few.
    """
    for low_bit in formats:
        logits = {}
        for device in ("cpu", "cuda"):
            config = ServingConfig(
                model_path=model, low_bit=low_bit, device=device, max_model_len=512,
                kv_cache_memory=2**28, max_num_batched_tokens=512, enforce_eager=True,
            )  # fmt: skip
            started = start_worker(config, join_group({}))
            vocab_size = started.model.config.vocab_size
            logits[device] = [
                started.runner.run(write_logits_step(*step, vocab_size)).whole.float().cpu()
                for step in ((0, 300), (0, 60), (60, 1), (61, 1))
            ]
        errors = [
            float((a - b).norm() / a.norm())
            for a, b in zip(logits["cpu"], logits["cuda"], strict=True)
        ]
        best = [
            (a.argmax(-1) == b.argmax(-1)).float().mean().item()
            for a, b in zip(logits["cpu"], logits["cuda"], strict=True)
        ]
        print(
            f"{low_bit}: logits of 300 tokens, 60, 1, 1: relative differences "
            f"{[round(e, 4) for e in errors]}, equal choices {[round(b, 3) for b in best]}",
            flush=True,
        )


def write_logits_step(start: int, length: int, vocab_size: int) -> Batch:
    """Tokens of one sequence in the first blocks, all of whose logits are asked for."""
    tokens = [(position * 7919 + 37) % vocab_size for position in range(start, start + length)]
    return replace(make_batch(1, start, tokens, 16), sampled=[], score_rows=list(range(length)))


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Where two answers part."""
    if a == b:
        return None
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def answer(model: str, low_bit: str, device: str, how: str) -> list[dict[str, Any]]:
    """Greedy answers to questions of recall_sample.json, and how far apart the log-probabilities
    of each token's best two lay.

    Args:
        how: "eager": without graphs.
    """
    params = SamplingParams(max_tokens=32, temperature=0.0, logprobs=2)
    sample = json.loads((Path(model) / "recall_sample.json").read_text())
    prompts = [entry["head"] for entries in sample.values() for entry in entries[:100]]
    settings = ServingConfig(
        model_path=model, low_bit=low_bit, device=device, enforce_eager=how == "eager",
        max_num_seqs=32, max_model_len=512, kv_cache_memory=2**28, max_num_batched_tokens=512,
    )  # fmt: skip
    with LLM(**vars(settings)) as llm:
        done = llm.generate(prompts, params, show_progress=False)
    return [
        {
            "ids": completion.token_ids,
            "gaps": [abs(a.top[0][1] - a.top[1][1]) for a in completion.logprobs],
        }
        for completion in done
    ]


if __name__ == "__main__":
    main()

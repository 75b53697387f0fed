"""benchmark_latency.py and benchmark_throughput.py: flags, figures, bounds; the demo model once."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import benchmark_latency
import benchmark_throughput
from autotp_serving.config import ConfigError, ServingConfig
from benchmarks.bound import Bounds, ModelCosts, find_costs
from benchmarks.hardware import Hardware
from benchmarks.offline import parse_serving_flags

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "demo_model")
HARDWARE = Hardware("cpu", 2, 1, 10e9, 1e12, 2e12)
COSTS = ModelCosts(1e9, 2e9, 0, 0, 1.0, 1e8, 1e8, 1e4, 1000)


def test_a_decode_step_reads_all_weights_and_the_cache():
    bound = Bounds(COSTS, HARDWARE, low_bit=False).decode(8, 100_000)
    assert bound.reading == pytest.approx((1e9 + 1e8 + 1e4 * 100_000) / 10e9)
    assert bound.multiplying == pytest.approx((2 * 8 * 2.1e9 + 4 * 100_000 * 1000) / 1e12)
    assert (bound.limit, bound.seconds) == ("memory", bound.reading)


def test_prefill_needs_the_head_for_the_last_token_only():
    bound = Bounds(COSTS, HARDWARE, low_bit=True).prefill([1000, 1000])
    pairs = 2 * 1000 * 1001 // 2
    expected = (2 * 2000 * 2e9 + 2 * 2 * 1e8 + 4 * pairs * 1000) / 2e12  # int8's rate
    assert bound.multiplying == pytest.approx(expected)
    assert bound.limit == "multiplying"


def test_a_whole_job_shares_the_reads_of_full_steps():
    bounds = Bounds(COSTS, HARDWARE, low_bit=False)
    alone = bounds.whole_job([(1, 101)], 8)
    eight = bounds.whole_job([(1, 101)] * 8, 8)
    assert alone.reading == pytest.approx(100 * 1.1e9 / 10e9, rel=0.02)
    assert eight.reading == pytest.approx(alone.reading, rel=0.05)


def test_few_tokens_need_few_experts():
    costs = ModelCosts(0, 0, 8e9, 8e9, 0.25, 0, 0, 0, 0)
    assert costs.step_bytes(1, 0) == pytest.approx(2e9)
    assert costs.step_bytes(100, 0) == pytest.approx(8e9)
    assert costs.operations(1, 1, 0) == pytest.approx(2 * 2e9)


def test_costs_of_the_demo_model_are_those_of_its_files():
    config = json.loads((ROOT / "demo_model" / "config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * wide
    costs = find_costs(ServingConfig(DEMO, low_bit="bf16", device="cpu"))
    assert costs.body_numbers == pytest.approx(config["num_hidden_layers"] * layer, rel=0.01)
    assert costs.head_numbers == config["vocab_size"] * hidden
    assert costs.body_bytes == pytest.approx(2 * costs.body_numbers)
    assert costs.kv_bytes == 2 * 2 * kv_heads * head_dim * config["num_hidden_layers"]
    less = find_costs(ServingConfig(DEMO, low_bit="sym_int4", device="cpu"))
    assert less.body_numbers == pytest.approx(costs.body_numbers, rel=0.01)
    assert less.body_bytes < 0.3 * costs.body_bytes


def test_a_batch_is_cut_into_prefill_and_full_steps():
    arrivals = [(2.0, ("a",)), (3.0, ("a", "b")), (3.5, ("a", "b")), (4.5, ("a", "b")), (9, ("b",))]
    run = benchmark_latency.split_run(1.0, arrivals, 2)
    assert run == {"prefill_seconds": 2.0, "step_seconds": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--quantization", "awq"], "--quantization is not supported: use --low-bit"),
        (["--async-engine"], "use benchmark.py"),
        (["--gpu-memory-utilisation", "0.8"], "did you mean --gpu-memory-utilization"),
    ],
)
def test_flags_that_cannot_be_honoured_are_named(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_serving_flags(["--model", DEMO, *words], "x")


def test_upstreams_spellings_work(capsys):
    words = [
        "--model",
        DEMO,
        "--load-in-low-bit",
        "sym_int8",
        "--enable-chunked-prefill",
        "-tp",
        "2",
    ]
    words += [
        "--enforce-eager",
        "--trust-remote-code",
        "--dtype",
        "float16",
        "--gpu-memory-utilization=0.85",
    ]
    config = parse_serving_flags(words, "benchmark_throughput.py")
    assert (config.low_bit, config.tensor_parallel_size, config.dtype) == ("sym_int8", 2, "float16")
    assert config.trust_remote_code and config.gpu_memory_utilization == 0.85
    assert config.enforce_eager
    assert "--enable-chunked-prefill changes nothing" in capsys.readouterr().out


def throughput_options(*words: str) -> tuple[argparse.Namespace, ServingConfig]:
    options, rest = benchmark_throughput.build_parser().parse_known_args(["--model", DEMO, *words])
    return options, parse_serving_flags(rest, "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--backend", "vllm"], "python -m benchmarks.peers vllm_cpu"),
        (["--backend", "mii"], "MII is not among the peers"),
        (["--backend", "hf"], "needs --hf-max-batch-size"),
        (["--backend", "hf", "--hf-max-batch-size", "2", "--low-bit", "sym_int4"], "it runs bf16"),
        (["--hf-max-batch-size", "2"], "--max-num-seqs"),
        (["--dataset", "x.json", "--input-len", "5"], "--input-len is for random prompts"),
        (["--dataset-name", "sharegpt"], "needs the file"),
        (["--random-range-ratio", "1.5"], "below 1, not 1.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        benchmark_throughput.check_options(*throughput_options(*words))


class Words:
    """A tokenizer of one token a word."""

    vocab_size = 1000

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * len(text.split())


def test_random_jobs_have_the_asked_lengths():
    options, config = throughput_options("--input-len", "50", "--output-len", "7",
                                         "--num-prompts", "3", "--n", "2")  # fmt: skip
    jobs = benchmark_throughput.make_jobs(options, Words(), config)
    assert [(len(job.prompt), job.output_len) for job in jobs] == [(50, 7)] * 6
    assert len({tuple(job.prompt) for job in jobs}) == 3
    options.random_range_ratio = 0.5
    lengths = {len(job.prompt) for job in benchmark_throughput.make_jobs(options, Words(), config)}
    assert len(lengths) > 1 and all(25 <= length <= 75 for length in lengths)


def test_a_dataset_brings_its_own_lengths(tmp_path):
    def talk(question: int, answer: int) -> dict:
        turns = [
            {"from": "human", "value": "q " * question},
            {"from": "gpt", "value": "a " * answer},
        ]
        return {"conversations": turns}

    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([talk(10, 20), talk(2, 20), talk(1100, 5), talk(30, 6)]))
    options, config = throughput_options("--dataset", str(path))
    jobs = benchmark_throughput.read_jobs(options, Words(), random.Random(config.seed))
    assert sorted((len(job.prompt), job.output_len) for job in jobs) == [(10, 20), (30, 6)]
    options.output_len = 9
    jobs = benchmark_throughput.read_jobs(options, Words(), random.Random(0))
    assert {job.output_len for job in jobs} == {9}


@pytest.mark.ranks
def test_the_last_line_is_json_on_two_ranks_and_each_leaves_a_profile(tmp_path):
    words = ["benchmark_latency.py", "--model", DEMO, "--low-bit", "bf16", "--device", "cpu",
             "--input-len", "40", "--output-len", "60", "--num-iters", "1", "--num-iters-warmup",
             "0", "--kv-cache-memory", "16MiB", "--profile", str(tmp_path)]  # fmt: skip
    mpirun = str(Path(sys.executable).with_name("mpirun"))
    done = subprocess.run(
        [mpirun, "-np", "2", sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["hardware"]["num_ranks"] == 2
    assert result["prefill_bound_ms"] > 0
    assert result["decode_bound_ms"] > 0
    assert result["decode_step_ms"]["p50"] > 0
    for rank in (0, 1):
        breakdown = (tmp_path / f"decode-rank{rank}.txt").read_text()
        assert all(part in breakdown for part in ("linears", "attention", "collectives"))
        trace = json.loads((tmp_path / f"trace-rank{rank}.json").read_text())
        names = [event["name"] for event in trace["traceEvents"]]
        assert names.count("forward pass") == 3
    assert "host: scheduling" in done.stdout


def test_a_bad_start_is_one_line(capsys):
    assert benchmark_throughput.main(["--model", "/nowhere", "--backend", "mii"]) == 2
    assert capsys.readouterr().err.startswith("benchmark_throughput.py: error: --backend mii: ")


def test_a_number_of_ranks_that_were_not_started_is_refused(capsys):
    assert benchmark_latency.main(["--model", DEMO, "--device", "cpu", "-tp", "3"]) == 2
    assert "--tensor-parallel-size 3, but 1 rank was started" in capsys.readouterr().err

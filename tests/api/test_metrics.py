"""/metrics: Prometheus' format, the right numbers."""

from __future__ import annotations

import asyncio
import re

import httpx

from autotp_serving.api.metrics import Histogram, Latencies, Progress
from autotp_serving.request import RequestOutput
from tests.api.service import client

LINE = re.compile(r'([a-z_:0-9]+)\{((?:[a-z_]+="[^"]*",?)+)\} (\S+)')


def scrape(text: str) -> dict[str, float]:
    """Samples by name and labels, the model's name left out; every line must parse."""
    samples = {}
    for line in text.splitlines():
        if line.startswith(("# HELP autotp:", "# TYPE autotp:")):
            continue
        match = LINE.fullmatch(line)
        assert match, line
        labels = match[2].replace('model_name="letters"', "").strip(",")
        samples[f"{match[1]}{{{labels}}}" if labels else match[1]] = float(match[3])
    return samples


def test_numbers_of_some_requests() -> None:
    async def go() -> httpx.Response:
        async with client() as (http, _):
            for prompt, length in (("What is AI?", 64), ("x" * 32, 5), ("x" * 32, 5)):
                body = {"prompt": prompt, "n_predict": length}
                assert (await http.post("/generate", json=body)).status_code == 200
            return await http.get("/metrics")

    reply = asyncio.run(go())
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = scrape(reply.text)
    assert samples["autotp:num_requests_running"] == samples["autotp:num_requests_waiting"] == 0
    assert samples["autotp:kv_cache_usage_perc"] == 0
    assert samples["autotp:prompt_tokens_total"] == 75
    assert samples["autotp:generation_tokens_total"] == 39
    assert samples['autotp:request_success_total{finished_reason="stop"}'] == 1
    assert samples['autotp:request_success_total{finished_reason="length"}'] == 2
    assert samples["autotp:kv_blocks"] == 2048 and samples["autotp:kv_blocks_held"] == 0
    num_steps = samples["autotp:num_steps_total"]
    for rank in (0, 1):
        assert samples[f'autotp:rank_steps_total{{rank="{rank}"}}'] == num_steps
        assert samples[f'autotp:rank_step_seconds_total{{rank="{rank}"}}'] == 0.5 * num_steps
        assert samples[f'autotp:collectives_total{{rank="{rank}"}}'] == 2 * num_steps
        assert samples[f'autotp:collective_bytes_total{{rank="{rank}"}}'] == 4096
        assert samples[f'autotp:collective_seconds_total{{rank="{rank}"}}'] == 0.25
    for part in ("queue", "prefill", "decode"):
        assert samples[f"autotp:request_{part}_time_seconds_count"] == 3
    assert samples["autotp:prefix_cache_hits_total"] > 0
    assert samples["autotp:time_to_first_token_seconds_count"] == 3
    assert samples["autotp:inter_token_latency_seconds_count"] == 36
    assert samples["autotp:e2e_request_latency_seconds_count"] == 3
    assert samples["autotp:request_prompt_tokens_sum"] == 75
    assert samples['autotp:request_generation_tokens_bucket{le="5"}'] == 2
    assert samples['autotp:request_generation_tokens_bucket{le="+Inf"}'] == 3


def test_histogram_bounds_are_inclusive() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 3):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1] and histogram.sum == 8


def test_a_requests_time_is_split_into_queue_prefill_and_decode() -> None:
    latencies, progress = Latencies(), Progress(arrival_time=10.0)
    latencies.observe(progress, RequestOutput("a", "x", (1,), queue_seconds=0.5), 12.0)
    latencies.observe(progress, RequestOutput("a", "y", (2,), "stop", queue_seconds=0.5), 15.0)
    assert latencies.request_queue_time.sum == 0.5
    assert latencies.request_prefill_time.sum == 1.5
    assert latencies.request_decode_time.sum == 3.0


def test_several_tokens_at_once_share_their_interval() -> None:
    latencies, progress = Latencies(), Progress(arrival_time=10.0)
    latencies.observe(progress, RequestOutput("a", "x", (1,)), 12.0)
    latencies.observe(progress, RequestOutput("a", "xyz", (1, 2, 3)), 18.0)
    latencies.observe(progress, RequestOutput("a", "", (), "abort"), 19.0)
    assert latencies.time_to_first_token.sum == 2.0
    assert latencies.inter_token_latency.sum == 6.0
    assert sum(latencies.inter_token_latency.counts) == 3
    assert sum(latencies.e2e_request_latency.counts) == 0

"""Figures from replies: only completed tokens count, and each figure means what it says."""

from __future__ import annotations

import numpy
import pytest

from benchmarks.apis import APIS, Reply, read_response
from benchmarks.http_client import Response
from benchmarks.metrics import (
    Spread,
    Timing,
    parse_slo_limit,
    read_server_counters,
    server_view,
    summarize,
)


def reply(times, *, tokens=None, failure=None, started=0.0, finished=None, prompt=10):
    return Reply(
        started,
        finished if finished is not None else times[-1],
        list(times),
        prompt,
        len(times) if tokens is None else tokens,
        "length",
        failure,
    )


def test_percentiles_are_numpy_s():
    samples = list(numpy.random.default_rng(0).exponential(size=257))
    spread = Spread.of(samples)
    for share, value in ((50, spread.p50), (90, spread.p90), (95, spread.p95), (99, spread.p99)):
        assert value == pytest.approx(numpy.percentile(samples, share) * 1e3)
    assert spread.mean == pytest.approx(numpy.mean(samples) * 1e3)
    assert spread.max == pytest.approx(max(samples) * 1e3)
    assert Spread.of([]) is None
    assert Spread.of([0.002]).p99 == 2.0


def test_timing_of_one_request():
    timing = Timing.of(reply([1.5, 1.6, 1.8], started=1.0, finished=1.9))
    assert timing.ttft == pytest.approx(0.5)
    assert timing.tpot == pytest.approx(0.15)
    assert timing.gaps == pytest.approx((0.1, 0.2))
    assert timing.e2e == pytest.approx(0.9)


def test_tokens_that_share_an_event_still_count_one_by_one():
    timing = Timing.of(reply([1.0, 2.0], tokens=11))
    assert timing.tpot == pytest.approx(0.1)
    assert Timing.of(reply([1.0], tokens=1)).tpot is None


def test_failed_requests_add_no_token_and_no_latency():
    good = reply([0.1, 0.2], finished=0.2)
    cut = reply([0.1, 0.2, 0.3], failure="connection closed in mid-response")
    summary = summarize([good, cut, good, reply([9.0], failure="HTTP 500", tokens=0)], 2.0)
    assert summary["requests"], summary["completed"] == (4, 2)
    assert summary["failed"] == 2
    assert summary["failures"] == {"connection closed in mid-response": 1, "HTTP 500": 1}
    assert summary["output_tokens"] == 4
    assert summary["input_tokens"] == 20
    assert summary["output_token_throughput"] == 2.0
    assert summary["total_token_throughput"] == 12.0
    assert summary["request_throughput"] == 1.0
    assert summary["ttft_ms"]["max"] == pytest.approx(100)
    assert summary["events_of_failed_requests"] == 4


def test_nothing_completed():
    summary = summarize([reply([0.1], failure="x")], 1.0)
    assert summary["output_token_throughput"] == 0
    assert summary["ttft_ms"] is None


def test_goodput_wants_every_limit_kept():
    fast = reply([0.1, 0.12, 0.14])
    late = reply([0.9, 0.92, 0.94])
    hiccup = reply([0.1, 0.12, 0.4])
    slo = dict(map(parse_slo_limit, ["ttft=500", "itl=50"]))
    summary = summarize([fast, late, hiccup], 2.0, slo)
    assert summary["good_requests"] == 1
    assert summary["goodput"] == 0.5
    for bad in ("ttft", "ttft=x", "speed=3"):
        with pytest.raises(ValueError, match=bad.split("=")[0]):
            parse_slo_limit(bad)


def test_server_counters_with_any_prefix():
    page = (
        "# HELP vllm:generation_tokens_total x\n"
        'vllm:generation_tokens_total{model="m"} 100.0\n'
        "vllm:prompt_tokens_total 30\n"
        "autotp_time_to_first_token_seconds_sum 4\n"
        "autotp_time_to_first_token_seconds_count 8\n"
        "other_total 5\n"
    )
    before = read_server_counters(page)
    after = read_server_counters(page.replace("100.0", "150").replace("_sum 4", "_sum 6").replace(
        "_count 8", "_count 12"))  # fmt: skip
    assert server_view(before, after) == {
        "output_tokens": 50,
        "input_tokens": 0,
        "ttft_mean_ms": 500,
    }
    assert server_view({}, {}) is None


def read(api, text, status=200):
    answer = Reply(0.0)
    response = Response(status, {}, [(1.0, text[:40]), (2.0, text[40:])], 3.0)
    read_response(APIS[api], response, answer)
    return answer


NATIVE = (
    b'{"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": null}\n'
    b'{"index": 1, "message": {"role": "assistant", "content": ""}, "finish_reason": null}\n'
    b'{"index": 2, "message": {"role": "assistant", "content": null}, "finish_reason": "length"}\n'
)


def test_native_lines():
    answer = read("native", NATIVE)
    assert (answer.num_output_tokens, answer.text, answer.failure) == (2, "a", None)
    assert answer.finish_reason == "length"
    assert answer.token_times == [2.0, 2.0]  # a line arrives with its last byte


def test_sse_events():
    events = (
        b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
        b": a comment\n\n"
        b'data: {"choices": [{"delta": {"content": "hi"}, "finish_reason": null}]}\r\n\r\n'
        b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
        b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}\n\n'
        b"data: [DONE]\n\n"
    )
    answer = read("chat", events)
    assert (answer.failure, answer.text, answer.finish_reason) == (None, "hi", "stop")
    assert (answer.num_prompt_tokens, answer.num_output_tokens) == (5, 3)
    assert len(answer.token_times) == 1


@pytest.mark.parametrize(
    ("api", "text", "status", "failure"),
    [
        ("native", NATIVE, 503, "HTTP 503"),
        ("native", NATIVE[:171], 200, "the stream ended early"),
        ("native", b"", 200, "the stream ended early"),
        ("native", b"<html>not what you asked for, is it?</html>", 200, "cannot be read"),
        ("native", b'{"index": 0}' + b" " * 40, 200, "cannot be read"),
        ("chat", b'data: {"error": {"message": "rank 1 died"}}\n\n', 200, "rank 1 died"),
        ("chat", b'data: {"choices": [{"text": "a", "finish_reason": "stop"}]}', 200, "early"),
    ],
)  # fmt: skip
def test_broken_streams_are_failures(api, text, status, failure):
    assert failure in read(api, text, status).failure

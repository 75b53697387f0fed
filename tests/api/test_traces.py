"""Traces: spans of a request and its completions, the trace they join, what they never hold."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from autotp_serving.api.traces import MAX_TRACED_COMPLETIONS, Traces, open_traces
from autotp_serving.config import ConfigError, ServingConfig
from tests.api.service import client

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHAT = {"messages": [{"role": "user", "content": "What is AI?"}], "temperature": 0}
SECRET = "What is AI?"


def collect(ask: Callable[[httpx.AsyncClient], Any], **options: Any) -> list[Any]:
    """Spans of what is asked, in the order in which they ended."""
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()

    async def go() -> None:
        async with client(traces=Traces(exporter, "letters"), **options) as (http, service):
            await ask(http)
            assert not service.app.user_middleware[0].kwargs["traces"]._open, "all have ended"

    asyncio.run(go())
    return list(exporter.get_finished_spans())


def test_a_streamed_chat_has_its_spans_in_the_clients_trace_and_no_text():
    async def ask(http: httpx.AsyncClient) -> None:
        headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "X-Request-Id": "mine"}
        body = CHAT | {"stream": True, "max_tokens": 9, "top_k": 10**400, "seed": 2**64 - 1}
        reply = await http.post("/chat/completions", json=body, headers=headers)
        assert reply.status_code == 200
        await http.get("/health")

    queue, prefill, decode, root = collect(ask, delay=0.01)
    assert [span.name for span in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
    assert root.name == "POST /v1/chat/completions" and root.kind.name == "SERVER"
    assert f"{root.context.trace_id:032x}" == TRACE_ID
    assert f"{root.parent.span_id:016x}" == PARENT_ID
    for child in (queue, prefill, decode):
        assert child.context.trace_id == root.context.trace_id
        assert child.parent.span_id == root.context.span_id
    times = [time for span in (queue, prefill, decode) for time in (span.start_time, span.end_time)]
    assert [root.start_time, *times, root.end_time] == sorted(
        [root.start_time, *times, root.end_time]
    )
    assert queue.end_time == prefill.start_time and prefill.end_time == decode.start_time
    assert decode.end_time - decode.start_time > 8 * 0.01 * 1e9
    attributes = dict(root.attributes)
    assert 0 < attributes.pop("gen_ai.response.time_to_first_chunk") < 60
    num_prompt = attributes["gen_ai.usage.input_tokens"]
    assert attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "http.response.header.x-request-id": ("mine",),
        "url.scheme": "http",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "autotp-serving",
        "gen_ai.request.model": "letters",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 2.0**31,
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "letters",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": num_prompt,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    assert prefill.attributes["gen_ai.usage.input_tokens"] == num_prompt > 9
    assert decode.attributes["gen_ai.usage.output_tokens"] == 9
    assert SECRET not in "".join(span.to_json() for span in (queue, prefill, decode, root))


def test_refusals_failures_and_unsampled_traces():
    async def ask(http: httpx.AsyncClient) -> None:
        await http.post("/v1/completions", json={"prompt": SECRET, "nonsense": 1})
        await http.get(f"/nowhere/{SECRET}")
        await http.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 9, "n": 2})
        headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
        await http.post("/generate", json={"prompt": SECRET}, headers=headers)

    *spans, failed = collect(ask, fail_at_step=3)
    refused, lost, *children = spans
    assert (refused.name, refused.attributes["error.type"]) == ("POST /v1/completions", "400")
    assert lost.name == "GET" and "http.route" not in lost.attributes
    assert refused.status.status_code.name == lost.status.status_code.name == "UNSET"
    assert [span.name for span in children] == 2 * ["queue", "prefill", "decode"]
    assert failed.attributes["gen_ai.request.choice.count"] == 2
    assert failed.attributes["gen_ai.response.finish_reasons"] == ("error", "error")
    assert failed.attributes["error.type"] == "engine_failed"
    assert failed.status.status_code.name == "ERROR"
    assert SECRET not in "".join(span.to_json() for span in (*spans, failed))


def test_one_call_has_so_many_spans_at_most():
    async def ask(http: httpx.AsyncClient) -> None:
        body = {"prompt": ["x"] * (MAX_TRACED_COMPLETIONS + 8), "max_tokens": 1}
        assert (await http.post("/v1/completions", json=body)).status_code == 200

    names = [span.name for span in collect(ask)]
    assert names.count("queue") == names.count("prefill") == MAX_TRACED_COMPLETIONS
    assert "decode" not in names and names[-1] == "POST /v1/completions"


def test_without_the_packages_or_with_no_such_protocol_one_line_says_the_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ServingConfig(model_path="m", otlp_traces_endpoint="http://127.0.0.1:9/v1/traces")
    assert open_traces(ServingConfig(model_path="m")) is None
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="pip install opentelemetry-sdk opentelemetry-exporter"):
        open_traces(config)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon")
    with pytest.raises(ConfigError, match="carrier-pigeon is no protocol"):
        open_traces(config)
    with pytest.raises(ConfigError, match="is no URL"):
        ServingConfig(model_path="m", otlp_traces_endpoint="grpc://collector:4317")

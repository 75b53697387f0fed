"""OpenTelemetry traces: HTTP requests, and their completions' queue, prefill and decode. Rank 0.

Spans hold names, settings, numbers of tokens and times, never a prompt or a completion. Those below
the request's are written when a completion ends, from times that are kept anyway, so a token costs
nothing. OpenTelemetry's packages are imported only where there is an endpoint to send traces to.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from autotp_serving import __version__
from autotp_serving.api.metrics import Progress
from autotp_serving.api.middleware import RequestRecord
from autotp_serving.api.route_paths import RoutePaths
from autotp_serving.config import ConfigError, ServingConfig
from autotp_serving.request import Request, RequestOutput

SERVICE_NAME = "autotp-serving"

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/generate/": "text_completion",
    "/generate": "text_completion",
    "/generate_stream/": "text_completion",
    "/generate_stream": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""What OpenTelemetry calls that which a route does."""

EXPORTERS = {"http/protobuf": "http", "grpc": "grpc"}

MAX_TRACED_COMPLETIONS = 16
"""Of one call; thousands of inputs to embed would push all other spans out of the exporter."""

EXPORT_SECONDS = 5
"""That a batch of spans may take to be sent; at the end the server waits as long for the last."""


@dataclass
class RequestTrace:
    """The trace of one HTTP request while it is served.

    Attributes:
        span: of the request.
        context: in which its children are.
        epoch: nanoseconds since 1970 at which the monotonic clock was 0.
        submitted: monotonic seconds at which its latest completions began to wait.
        num_completions: so many have spans of their own.
    """

    span: Any
    context: Any
    epoch: int
    submitted: float = 0.0
    num_completions: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    first_chunk_seconds: float | None = None
    error: str | None = None

    def at(self, seconds: float) -> int:
        """Monotonic seconds as OpenTelemetry has times."""
        return self.epoch + int(seconds * 1e9)


class Traces:
    """Makes spans and sends them, in a thread of OpenTelemetry's own, which drops what is too much.

    Args:
        exporter: where spans go.
        model_name: of the model that is served.

    Raises:
        ConfigError: OpenTelemetry's SDK is not installed.
    """

    def __init__(self, exporter: Any, model_name: str) -> None:
        sdk = _load("opentelemetry.sdk.trace")
        export = _load("opentelemetry.sdk.trace.export")
        resources = _load("opentelemetry.sdk.resources")
        self._api = _load("opentelemetry.trace")
        propagation = _load("opentelemetry.trace.propagation.tracecontext")
        self._propagator = propagation.TraceContextTextMapPropagator()
        name = os.environ.get("OTEL_SERVICE_NAME", SERVICE_NAME)
        resource = resources.Resource.create({"service.name": name, "service.version": __version__})
        self._provider = sdk.TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("autotp_serving", __version__)
        self._model_name = model_name
        self._open: dict[str, RequestTrace] = {}

    def begin(self, scope: Scope, record: RequestRecord, paths: RoutePaths) -> None:
        """An HTTP request has come; it belongs to its client's trace, if it names one."""
        carrier: dict[str, str] = {}
        for key, value in scope["headers"]:
            if key in (b"traceparent", b"tracestate"):
                name, text = key.decode("ascii"), value.decode("latin-1")
                carrier[name] = f"{carrier[name]},{text}" if name in carrier else text
        route = paths.find_route(scope["path"])
        method = scope["method"]
        epoch = time.time_ns() - int(time.monotonic() * 1e9)
        attributes = {
            "http.request.method": method,
            "url.scheme": scope.get("scheme", "http"),
            "http.response.header.x-request-id": [record.client_id or record.request_id],
        }
        if route is not None:
            attributes["http.route"] = route
        if route in OPERATIONS:
            attributes["gen_ai.operation.name"] = OPERATIONS[route]
            attributes["gen_ai.provider.name"] = SERVICE_NAME
            attributes["gen_ai.request.model"] = self._model_name
        span = self._tracer.start_span(
            method if route is None else f"{method} {route}",
            context=self._propagator.extract(carrier),
            kind=self._api.SpanKind.SERVER,
            attributes=attributes,
            start_time=epoch + int(record.arrival_time * 1e9),
        )
        if span.is_recording():
            context = self._api.set_span_in_context(span)
            self._open[record.request_id] = RequestTrace(span, context, epoch)

    def submit(self, requests: Sequence[Request]) -> None:
        """Completions of an HTTP request begin to wait."""
        trace = self._find(requests[0].request_id)
        if trace is None:
            return
        trace.submitted = time.monotonic()
        params = requests[0].params
        attributes: dict[str, Any] = {}
        if params.pooling is None:
            attributes = {
                "gen_ai.request.max_tokens": params.max_tokens,
                "gen_ai.request.temperature": float(params.temperature),
                "gen_ai.request.top_p": float(params.top_p),
            }
            if params.top_k:
                attributes["gen_ai.request.top_k"] = float(min(params.top_k, 2**31))
            if params.seed is not None and params.seed < 2**63:  # OTLP has no larger ones
                attributes["gen_ai.request.seed"] = params.seed
            prompt = requests[0].prompt_token_ids
            num_choices = sum(one.prompt_token_ids is prompt for one in requests)
            if num_choices > 1:
                attributes["gen_ai.request.choice.count"] = num_choices
        trace.span.set_attributes(attributes)

    def finish(
        self, request_id: str, progress: Progress, output: RequestOutput | None, now: float
    ) -> None:
        """A completion has ended.

        Args:
            progress: when what came of it.
            output: its last one; None where it is left by its client, or was never run.
            now: monotonic seconds.
        """
        trace = self._find(request_id)
        if trace is None:
            return
        reason = "abort" if output is None else output.finish_reason or "abort"
        trace.finish_reasons.append(reason)
        if reason == "error" and output is not None:
            trace.error = output.error_code or "engine_failed"
        if progress.first_time is not None and trace.first_chunk_seconds is None:
            trace.first_chunk_seconds = progress.first_time - progress.arrival_time
        trace.num_completions += 1
        if trace.num_completions > MAX_TRACED_COMPLETIONS:
            return
        if progress.queue_seconds is None:
            self._add(trace, "queue", trace.submitted, now)
        else:
            began = progress.arrival_time + progress.queue_seconds
            self._add(trace, "queue", trace.submitted, began)
            numbers = {} if output is None else {
                "gen_ai.usage.input_tokens": output.num_prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens,
            }  # fmt: skip
            self._add(trace, "prefill", began, progress.first_time or now, **numbers)
        if progress.first_time is not None and progress.latest_time != progress.first_time:
            numbers = {} if output is None else {
                "gen_ai.usage.output_tokens": output.num_output_tokens
            }  # fmt: skip
            self._add(trace, "decode", progress.first_time, now, **numbers)

    def end(self, record: RequestRecord) -> None:
        """An HTTP request is answered, or its client has left."""
        trace = self._open.pop(record.request_id, None)
        if trace is None:
            return
        span, usage = trace.span, record.usage
        span.set_attribute("http.response.status_code", record.status)
        if trace.finish_reasons:
            span.set_attributes(
                {
                    "gen_ai.response.model": self._model_name,
                    "gen_ai.response.finish_reasons": trace.finish_reasons,
                    "gen_ai.usage.input_tokens": usage.num_prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.num_output_tokens,
                    "gen_ai.usage.cache_read.input_tokens": usage.num_cached_tokens,
                    "gen_ai.request.stream": record.streams,
                }
            )
        if record.streams and trace.first_chunk_seconds is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", trace.first_chunk_seconds)
        error = trace.error or (str(record.status) if record.status >= 400 else None)
        if error is not None:
            span.set_attribute("error.type", error)
        if trace.error is not None or record.status >= 500:
            span.set_status(self._api.StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Send what is left; what that has not done in time is lost."""
        thread = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        thread.start()
        thread.join(EXPORT_SECONDS)

    def _find(self, request_id: str) -> RequestTrace | None:
        """The trace that an engine's request belongs to; its id is that of HTTP's and a number."""
        return self._open.get(request_id.rpartition("-")[0])

    def _add(
        self, trace: RequestTrace, name: str, start: float, end: float, **attributes: int
    ) -> None:
        span = self._tracer.start_span(
            name, context=trace.context, attributes=attributes, start_time=trace.at(start)
        )
        span.end(trace.at(max(start, end)))


def open_traces(config: ServingConfig) -> Traces | None:
    """What makes traces and sends them to --otlp-traces-endpoint; None where there is none.

    Raises:
        ConfigError: what it takes is not installed.
    """
    endpoint = config.otlp_traces_endpoint
    if endpoint is None:
        return None
    exporter = _load_exporter()(endpoint=endpoint, timeout=EXPORT_SECONDS)
    return Traces(exporter, config.model_names[0])


def _load_exporter() -> Any:
    """The class for the protocol that OpenTelemetry's own variables name."""
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := os.environ.get(name):
            break
    else:
        name, protocol = "", "http/protobuf"
    if protocol not in EXPORTERS:
        raise ConfigError(f"{name}={protocol} is no protocol for traces: set http/protobuf or grpc")
    kind = EXPORTERS[protocol]
    module = _load(f"opentelemetry.exporter.otlp.proto.{kind}.trace_exporter", kind)
    return module.OTLPSpanExporter


def _load(name: str, kind: str = "http") -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs OpenTelemetry's packages, and {error.name} is not "
            f"there: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-{kind}"
        ) from error

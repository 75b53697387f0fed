"""/metrics in Prometheus' text format, under vLLM's names with our prefix. Rank 0 only.

Written out by hand: a dozen numbers need no client library, and a histogram that only the event
loop touches needs no lock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from autotp_serving.engine import EngineStats
from autotp_serving.request import RequestOutput
from autotp_serving.step_times import RankTimes

PREFIX = "autotp:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5,
           5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Histogram:
    """Counts of observations by size.

    Args:
        bounds: upper ends of the buckets, ascending; a last one without end is added.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, or several equal ones."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


@dataclass
class Progress:
    """When one request arrived and its first and latest token came, in monotonic seconds."""

    arrival_time: float
    first_time: float | None = None
    latest_time: float | None = None


class Latencies:
    """How long clients wait, measured where the tokens leave the engine."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(SECONDS)
        self.inter_token_latency = Histogram(SECONDS)
        self.e2e_request_latency = Histogram(SECONDS)
        self.request_queue_time = Histogram(SECONDS)
        self.request_prefill_time = Histogram(SECONDS)
        self.request_decode_time = Histogram(SECONDS)
        self.request_prompt_tokens = Histogram(TOKENS)
        self.request_generation_tokens = Histogram(TOKENS)

    def observe(self, progress: Progress, output: RequestOutput, now: float) -> None:
        """Take note of one output of a request; requests that fail or are aborted have no end."""
        num_tokens = len(output.token_ids)
        if num_tokens:
            if progress.latest_time is None:
                progress.first_time = now
                wait = now - progress.arrival_time
                self.time_to_first_token.observe(wait)
                self.request_queue_time.observe(output.queue_seconds)
                self.request_prefill_time.observe(max(0.0, wait - output.queue_seconds))
            else:
                interval = (now - progress.latest_time) / num_tokens
                self.inter_token_latency.observe(interval, num_tokens)
            progress.latest_time = now
        if output.finish_reason in ("stop", "length"):
            seconds = now - progress.arrival_time
            self.e2e_request_latency.observe(seconds)
            self.request_prompt_tokens.observe(output.num_prompt_tokens)
            if output.pooled:  # there are no tokens
                self.request_queue_time.observe(output.queue_seconds)
                self.request_prefill_time.observe(max(0.0, seconds - output.queue_seconds))
                return
            self.request_decode_time.observe(now - (progress.first_time or now))
            self.request_generation_tokens.observe(output.num_output_tokens)

    def families(self) -> dict[str, tuple[str, Histogram]]:
        """Help text and histogram by name."""
        return {
            "time_to_first_token_seconds": ("Arrival to first token.", self.time_to_first_token),
            "inter_token_latency_seconds": ("One token to the next.", self.inter_token_latency),
            "e2e_request_latency_seconds": ("Arrival to last token.", self.e2e_request_latency),
            "request_queue_time_seconds": ("Arrival to first step.", self.request_queue_time),
            "request_prefill_time_seconds": (
                "First step to first token.",
                self.request_prefill_time,
            ),
            "request_decode_time_seconds": ("First to last token.", self.request_decode_time),
            "request_prompt_tokens": ("Prompt tokens of a request.", self.request_prompt_tokens),
            "request_generation_tokens": (
                "Generated tokens of a request.",
                self.request_generation_tokens,
            ),
        }


def render(
    stats: EngineStats,
    latencies: Latencies,
    num_refused: Mapping[str, int],
    rank_times: Sequence[RankTimes],
    model_name: str,
) -> str:
    """Everything as Prometheus reads it."""
    labels = {"model_name": model_name}
    lines = [
        *_render_engine(stats, num_refused, labels),
        *_render_ranks(rank_times, labels),
        *_render_latencies(latencies, labels),
        "",
    ]
    return "\n".join(lines)


def _render_engine(
    stats: EngineStats, num_refused: Mapping[str, int], labels: Mapping[str, str]
) -> Iterator[str]:
    usage = stats.num_held_blocks / stats.num_blocks
    gauges = {
        "num_requests_running": ("Requests that take part in steps.", stats.num_running),
        "num_requests_waiting": ("Requests that wait.", stats.num_waiting),
        "kv_blocks": ("KV blocks of each rank.", stats.num_blocks),
        "kv_blocks_held": ("KV blocks that running requests hold.", stats.num_held_blocks),
        "kv_cache_usage_perc": ("Share of KV blocks in use, 0 to 1.", usage),
        "last_step_seconds": ("How long the last step took.", stats.last_step_seconds),
    }
    counters = {
        "prompt_tokens_total": ("Prompt tokens run.", stats.num_prompt_tokens),
        "generation_tokens_total": ("Tokens generated.", stats.num_generated_tokens),
        "prefix_cache_queries_total": ("Tokens looked up.", stats.num_prefix_query_tokens),
        "prefix_cache_hits_total": ("Tokens found.", stats.num_prefix_hit_tokens),
        "spec_decode_num_drafts_total": ("Times a request had drafts.", stats.num_drafts),
        "spec_decode_num_draft_tokens_total": ("Drafts verified.", stats.num_draft_tokens),
        "spec_decode_num_accepted_tokens_total": ("Drafts accepted.", stats.num_accepted_tokens),
        "num_preemptions_total": ("Requests that lost their blocks.", stats.num_preemptions),
        "rank_restarts_total": ("Times the ranks were started anew.", stats.num_restarts),
        "num_steps_total": ("Steps run.", stats.num_steps),
    }
    for kind, families in (("gauge", gauges), ("counter", counters)):
        for name, (text, value) in families.items():
            yield from _head(name, text, kind)
            yield _sample(name, labels, value)
    yield from _head("request_success_total", "Requests ended, by reason.", "counter")
    for reason, count in stats.num_finished.items():
        yield _sample("request_success_total", {**labels, "finished_reason": reason}, count)
    yield from _head("admission_rejections_total", "Requests refused at the door.", "counter")
    for cause, count in num_refused.items():
        yield _sample("admission_rejections_total", {**labels, "reason": cause}, count)


def _render_ranks(rank_times: Sequence[RankTimes], labels: Mapping[str, str]) -> Iterator[str]:
    families = {
        "rank_steps_total": ("Forward passes of a rank.", "num_steps"),
        "rank_step_seconds_total": ("Time they took.", "step_seconds"),
        "collectives_total": ("All-reduces over all ranks inside them.", "num_collectives"),
        "collective_bytes_total": ("Bytes that a rank gave into them.", "collective_bytes"),
        "collective_seconds_total": ("Time they took, waits included.", "collective_seconds"),
    }
    for name, (text, field) in families.items():
        yield from _head(name, text, "counter")
        for rank, times in enumerate(rank_times):
            yield _sample(name, {**labels, "rank": str(rank)}, getattr(times, field))


def _render_latencies(latencies: Latencies, labels: Mapping[str, str]) -> Iterator[str]:
    for name, (text, histogram) in latencies.families().items():
        yield from _head(name, text, "histogram")
        total = 0
        bounds = (*map(str, histogram.bounds), "+Inf")
        for bound, count in zip(bounds, histogram.counts, strict=True):
            total += count
            yield _sample(f"{name}_bucket", {**labels, "le": bound}, total)
        yield _sample(f"{name}_sum", labels, histogram.sum)
        yield _sample(f"{name}_count", labels, total)


def _head(name: str, text: str, kind: str) -> tuple[str, str]:
    return f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    pairs = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    return f"{PREFIX}{name}{{{pairs}}} {value}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

"""/metrics in Prometheus' text format, under vLLM's names with our prefix. Rank 0 only.

Written out by hand: a dozen numbers need no client library, and a histogram that only the event
loop touches needs no lock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    queue_seconds: float | None = None  # None until then


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
                progress.queue_seconds = output.queue_seconds
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
                progress.queue_seconds = output.queue_seconds
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


@dataclass(frozen=True)
class GroupFigures:
    """Of one group of ranks.

    Attributes:
        is_up: it has ranks that are ready.
    """

    stats: EngineStats
    rank_times: Sequence[RankTimes]
    is_up: bool


def render(
    groups: Sequence[GroupFigures],
    latencies: Latencies,
    num_refused: Mapping[str, int],
    model_name: str,
) -> str:
    """Everything as Prometheus reads it; of several groups what each has, by its number."""
    labels = {"model_name": model_name}
    labelled = [(labels, group) for group in groups]
    if len(groups) > 1:
        labelled = [({**labels, "group": str(n)}, group) for n, group in enumerate(groups)]
    lines = [
        *_render_engines(labelled),
        *_render_refused(num_refused, labels),
        *_render_ranks(labelled),
        *_render_latencies(latencies, labels),
        "",
    ]
    return "\n".join(lines)


Labelled = Sequence[tuple[Mapping[str, str], GroupFigures]]


def _render_engines(groups: Labelled) -> Iterator[str]:
    gauges: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
        "num_requests_running": ("Requests that take part in steps.", lambda s: s.num_running),
        "num_requests_waiting": ("Requests that wait.", lambda s: s.num_waiting),
        "kv_blocks": ("KV blocks of each rank.", lambda s: s.num_blocks),
        "kv_blocks_held": ("KV blocks that running requests hold.", lambda s: s.num_held_blocks),
        "kv_cache_usage_perc": (
            "Share of KV blocks in use, 0 to 1.",
            lambda s: s.num_held_blocks / s.num_blocks,
        ),
        "last_step_seconds": ("How long the last step took.", lambda s: s.last_step_seconds),
    }
    counters: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
        "prompt_tokens_total": ("Prompt tokens run.", lambda s: s.num_prompt_tokens),
        "generation_tokens_total": ("Tokens generated.", lambda s: s.num_generated_tokens),
        "prefix_cache_queries_total": ("Tokens looked up.", lambda s: s.num_prefix_query_tokens),
        "prefix_cache_hits_total": ("Tokens found.", lambda s: s.num_prefix_hit_tokens),
        "kv_offload_hits_total": ("Tokens found in files.", lambda s: s.num_offload_hit_tokens),
        "spec_decode_num_drafts_total": ("Times a request had drafts.", lambda s: s.num_drafts),
        "spec_decode_num_draft_tokens_total": ("Drafts verified.", lambda s: s.num_draft_tokens),
        "spec_decode_num_accepted_tokens_total": (
            "Drafts accepted.",
            lambda s: s.num_accepted_tokens,
        ),
        "num_preemptions_total": ("Requests that lost their blocks.", lambda s: s.num_preemptions),
        "rank_restarts_total": ("Times the ranks were started anew.", lambda s: s.num_restarts),
        "num_steps_total": ("Steps run.", lambda s: s.num_steps),
    }
    for kind, families in (("gauge", gauges), ("counter", counters)):
        for name, (text, read) in families.items():
            yield from _head(name, text, kind)
            for labels, group in groups:
                yield _sample(name, labels, read(group.stats))
    if len(groups) > 1:
        yield from _head("group_up", "1 where a group's ranks are ready, else 0.", "gauge")
        for labels, group in groups:
            yield _sample("group_up", labels, int(group.is_up))
    yield from _head("request_success_total", "Requests ended, by reason.", "counter")
    for labels, group in groups:
        for reason, count in group.stats.num_finished.items():
            yield _sample("request_success_total", {**labels, "finished_reason": reason}, count)


def _render_refused(num_refused: Mapping[str, int], labels: Mapping[str, str]) -> Iterator[str]:
    yield from _head("admission_rejections_total", "Requests refused at the door.", "counter")
    for cause, count in num_refused.items():
        yield _sample("admission_rejections_total", {**labels, "reason": cause}, count)


def _render_ranks(groups: Labelled) -> Iterator[str]:
    families = {
        "rank_steps_total": ("Forward passes of a rank.", "num_steps"),
        "rank_step_seconds_total": ("Time they took.", "step_seconds"),
        "collectives_total": ("All-reduces over all ranks inside them.", "num_collectives"),
        "collective_bytes_total": ("Bytes that a rank gave into them.", "collective_bytes"),
        "collective_seconds_total": ("Time they took, waits included.", "collective_seconds"),
    }
    for name, (text, field) in families.items():
        yield from _head(name, text, "counter")
        for labels, group in groups:
            for rank, times in enumerate(group.rank_times):
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

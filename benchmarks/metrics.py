"""From replies to figures. Only completed requests count; failed ones are counted by kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from benchmarks.apis import Reply

SLO_NAMES = {
    "ttft": "time to first token",
    "tpot": "mean time per output token after the first",
    "itl": "longest wait between two tokens",
    "e2e": "time to the end of the answer",
}


@dataclass(frozen=True)
class Spread:
    """How one figure is spread over its samples, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread | None:
        """From samples in seconds; None without any."""
        if not samples:
            return None
        ordered = sorted(sample * 1e3 for sample in samples)
        return cls(
            sum(ordered) / len(ordered),
            *(percentile(ordered, share) for share in (50, 90, 95, 99)),
            ordered[-1],
        )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Percentile of sorted samples, linear between neighbours."""
    position = (len(ordered) - 1) * share / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Timing:
    """The latencies of one completed request, in seconds."""

    ttft: float
    tpot: float | None
    gaps: tuple[float, ...]
    e2e: float

    @classmethod
    def of(cls, reply: Reply) -> Timing | None:
        """None for a request that failed or brought no token."""
        if reply.failure is not None or not reply.token_times:
            return None
        times = reply.token_times
        num_tokens = reply.num_output_tokens or 0
        return cls(
            ttft=times[0] - reply.started,
            # Tokens may share an event, so the count is the server's and not the events'.
            tpot=(times[-1] - times[0]) / (num_tokens - 1) if num_tokens > 1 else None,
            gaps=tuple(b - a for a, b in pairwise(times)),
            e2e=reply.finished - reply.started,
        )

    def meets(self, slo: dict[str, float]) -> bool:
        """True when every limit (in milliseconds) is kept."""
        figures = {
            "ttft": self.ttft,
            "tpot": self.tpot or 0.0,
            "itl": max(self.gaps, default=0.0),
            "e2e": self.e2e,
        }
        return all(figures[name] * 1e3 <= limit for name, limit in slo.items())


def parse_slo_limit(text: str) -> tuple[str, float]:
    """Read a limit such as 'ttft=500'. Raises ValueError naming what is wrong."""
    name, _, value = text.partition("=")
    if name not in SLO_NAMES:
        raise ValueError(f"'{text}': the name must be one of {', '.join(SLO_NAMES)}")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"'{text}': write {name}=MILLISECONDS") from None


def summarize(
    replies: Sequence[Reply], duration: float, slo: dict[str, float] | None = None
) -> dict[str, object]:
    """All figures of one level, ready for JSON; times in milliseconds, rates per second."""
    completed = [reply for reply in replies if reply.failure is None]
    failures = Counter(reply.failure for reply in replies if reply.failure is not None)
    timings = [timing for reply in completed if (timing := Timing.of(reply))]
    num_input = sum(reply.num_prompt_tokens or 0 for reply in completed)
    num_output = sum(reply.num_output_tokens or 0 for reply in completed)
    spreads = {
        "ttft_ms": Spread.of([timing.ttft for timing in timings]),
        "tpot_ms": Spread.of([timing.tpot for timing in timings if timing.tpot is not None]),
        "itl_ms": Spread.of([gap for timing in timings for gap in timing.gaps]),
        "e2e_ms": Spread.of([timing.e2e for timing in timings]),
    }
    summary: dict[str, object] = {
        "requests": len(replies),
        "completed": len(completed),
        "failed": len(replies) - len(completed),
        "failures": dict(failures.most_common()),
        "events_of_failed_requests": sum(
            len(reply.token_times) for reply in replies if reply.failure is not None
        ),
        "finish_reasons": dict(Counter(str(reply.finish_reason) for reply in completed)),
        "duration_s": duration,
        "input_tokens": num_input,
        "output_tokens": num_output,
        "request_throughput": len(completed) / duration,
        "output_token_throughput": num_output / duration,
        "input_token_throughput": num_input / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        **{name: asdict(spread) if spread else None for name, spread in spreads.items()},
    }
    if slo:
        good = sum(timing.meets(slo) for timing in timings)
        summary |= {"slo": slo, "good_requests": good, "goodput": good / duration}
    return summary


SERVER_COUNTERS = {
    "generation_tokens_total": "output_tokens",
    "prompt_tokens_total": "input_tokens",
    "time_to_first_token_seconds_sum": "ttft_sum_s",
    "time_to_first_token_seconds_count": "ttft_count",
}


def read_server_counters(text: str) -> dict[str, float]:
    """The counters to check ours against, out of a Prometheus page; prefixes do not matter."""
    counters: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        series, _, value = line.rpartition(" ")
        name = series.partition("{")[0]
        for suffix, key in SERVER_COUNTERS.items():
            if re.search(rf"(^|[:_]){suffix}$", name):
                counters[key] = counters.get(key, 0.0) + float(value)
    return counters


def server_view(before: dict[str, float], after: dict[str, float]) -> dict[str, float] | None:
    """What the server counted in between; None when it keeps no such counters."""
    change = {key: after[key] - before.get(key, 0.0) for key in after}
    if "output_tokens" not in change:
        return None
    view = {"output_tokens": change["output_tokens"]}
    if "input_tokens" in change:
        view["input_tokens"] = change["input_tokens"]
    if change.get("ttft_count"):
        view["ttft_mean_ms"] = change["ttft_sum_s"] / change["ttft_count"] * 1e3
    return view

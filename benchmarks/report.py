"""What a run leaves behind: a table, a log per level, one JSON; and two JSONs side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.apis import Reply
from benchmarks.load import Level
from benchmarks.metrics import Timing

Report = dict[str, Any]

FORMAT = 1
MAX_KINDS = 10
LATENCIES = (
    ("ttft_ms", "Time to first token"),
    ("tpot_ms", "Time per output token"),
    ("itl_ms", "Inter-token latency"),
    ("e2e_ms", "End-to-end latency"),
)
COLUMNS = ("mean", "p50", "p90", "p95", "p99")
RATES = (
    ("request_throughput", "Requests per second"),
    ("output_token_throughput", "Output tokens per second"),
    ("input_token_throughput", "Input tokens per second"),
    ("total_token_throughput", "Total tokens per second"),
    ("goodput", "Good requests per second"),
)


def level_record(
    concurrency: int, level: Level, summary: dict[str, Any], server: dict[str, float] | None
) -> dict[str, Any]:
    """One level as it stands in the JSON; everything that the HTML report needs is in it."""
    return {
        "concurrency": concurrency,
        "summary": summary,
        "client": {
            "cpu_share": round(level.client.cpu_share, 4),
            "lag_p99_ms": round(level.client.lag_p99_ms, 3),
            "is_suspect": level.client.is_suspect,
        },
        "server": server,
        "unfinished": level.num_unfinished,
        "requests": [_request_record(reply) for reply in level.replies],
    }


def _request_record(reply: Reply) -> dict[str, Any]:
    record: dict[str, Any] = {
        "input_tokens": reply.num_prompt_tokens,
        "output_tokens": reply.num_output_tokens,
        "finish_reason": reply.finish_reason,
        "failure": reply.failure,
    }
    timing = Timing.of(reply)
    if timing is not None:
        record |= {
            "ttft_ms": round(timing.ttft * 1e3, 3),
            "e2e_ms": round(timing.e2e * 1e3, 3),
            "itl_ms": [round(gap * 1e3, 3) for gap in timing.gaps],
        }
    return record


def show_number(value: float | None) -> str:
    """Three or four telling digits."""
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:.0f}" if size >= 1000 else f"{value:.1f}" if size >= 100 else f"{value:.2f}"


def format_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay rows out in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def format_level(record: dict[str, Any]) -> list[str]:
    """One level as text, for its log file."""
    summary = record["summary"]
    rows = [
        ["Concurrent requests", str(record["concurrency"])],
        ["Completed requests", f"{summary['completed']} of {summary['requests']}"],
        ["Duration", f"{summary['duration_s']:.2f} s"],
        ["Input tokens", str(summary["input_tokens"])],
        ["Output tokens", str(summary["output_tokens"])],
    ]
    rows += [[name, show_number(summary[key])] for key, name in RATES if key in summary]
    lines = format_rows(rows)
    lines += ["", *format_rows(_latency_rows(summary))]
    return [*lines, "", *remarks(record)]


def _latency_rows(summary: dict[str, Any]) -> list[list[str]]:
    rows = [["Latency in ms", "mean", "P50", "P90", "P95", "P99", "max"]]
    for key, name in LATENCIES:
        spread = summary[key] or {}
        rows.append([name, *(show_number(spread.get(column)) for column in (*COLUMNS, "max"))])
    return rows


def remarks(record: dict[str, Any]) -> list[str]:
    """What a reader must know before quoting the figures; failures first."""
    summary = record["summary"]
    lines = []
    if unfinished := record.get("unfinished"):
        lines.append(
            f"INTERRUPTED: {unfinished} more request(s) were not answered or not sent; the rates "
            "above are a little low for those that were under way"
        )
    if summary["failed"]:
        lines.append(
            f"FAILED: {summary['failed']} of {summary['requests']} requests; no figure above "
            f"counts them or the {summary['events_of_failed_requests']} token event(s) they brought"
        )
        kinds = [f"  {count} x {kind}" for kind, count in summary["failures"].items()]
        lines += kinds[:MAX_KINDS]
        if len(kinds) > MAX_KINDS:
            lines.append(f"  and {len(kinds) - MAX_KINDS} other kinds, in the JSON")
    if "slo" in summary:
        limits = ", ".join(f"{name} <= {limit:g} ms" for name, limit in summary["slo"].items())
        lines.append(f"Good requests ({limits}): {summary['good_requests']}")
    early = summary["finish_reasons"].get("stop", 0)
    if early:
        lines.append(f"{early} request(s) ended before their last token (finish_reason stop)")
    server = record["server"]
    if server is not None:
        ours = summary["output_tokens"] + summary["events_of_failed_requests"]
        lines.append(
            f"The server's own count: {server['output_tokens']:.0f} output tokens ({ours} here)"
        )
        if "ttft_mean_ms" in server:
            lines[-1] += f", time to first token {server['ttft_mean_ms']:.2f} ms on average"
    client = record["client"]
    line = (
        f"The client used {client['cpu_share']:.1%} of a core; its clock was late by at most "
        f"{client['lag_p99_ms']:.2f} ms in 99 % of looks"
    )
    lines.append(line)
    if client["is_suspect"]:
        lines.append("SUSPECT: the client was short of processor time; run it on another machine")
    return lines


def format_table(report: Report) -> list[str]:
    """All levels side by side, then the remarks that matter."""
    levels = report["levels"]
    rows = [["Concurrent requests", *(str(level["concurrency"]) for level in levels)]]
    summaries = [level["summary"] for level in levels]
    rows.append(["Completed", *(f"{one['completed']}/{one['requests']}" for one in summaries)])
    for key, name in RATES:
        if key in summaries[0]:
            rows.append([name, *(show_number(one[key]) for one in summaries)])
    for key, name in LATENCIES:
        for column in COLUMNS:
            cells = [show_number(one[key][column] if one[key] else None) for one in summaries]
            rows.append([f"{name}, {column.upper() if column[0] == 'p' else column}, ms", *cells])
    lines = format_rows(rows)
    for level in levels:
        is_partial = level["summary"]["failed"] or level.get("unfinished")
        if is_partial or level["client"]["is_suspect"]:
            lines += ["", f"At {level['concurrency']}:", *remarks(level)]
    return lines


def write_log(path: Path, report: Report, record: dict[str, Any]) -> None:
    """The log of one level: settings, figures, then a line per request."""
    settings = report["settings"]
    lines = [f"{report['started']}  {settings['url']}  --api {settings['api']}", ""]
    lines += format_level(record)
    rows = [["request", "input", "output", "first token ms", "end to end ms", "outcome"]]
    for number, one in enumerate(record["requests"], 1):
        counts = [one["input_tokens"], one["output_tokens"]]
        times = [show_number(one.get(key)) for key in ("ttft_ms", "e2e_ms")]
        outcome = one["failure"] or str(one["finish_reason"])
        rows.append([str(number), *("-" if n is None else str(n) for n in counts), *times, outcome])
    path.write_text("\n".join([*lines, "", *format_rows(rows)]) + "\n", encoding="utf-8")


def write_json(path: Path, report: Report) -> None:
    """Everything, for other programs, --compare and the HTML report."""
    path.write_text(json.dumps(report, separators=(",", ":")) + "\n", encoding="utf-8")


def read_json(path: Path) -> Report:
    """Read a report back. Raises ValueError with one line."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a report ({error})") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT or "levels" not in report:
        raise ValueError(f"{path}: not a report of benchmark.py")
    return report


def format_comparison(names: Sequence[str], first: Report, second: Report) -> list[str]:
    """Two reports side by side, level by level, with the change from the first to the second."""
    lines = []
    different = {
        key: (first["settings"].get(key), second["settings"].get(key))
        for key in first["settings"]
        if first["settings"].get(key) != second["settings"].get(key)
    }
    if different:
        lines.append("Settings that differ:")
        lines += [f"  {key}: {a} | {b}" for key, (a, b) in different.items()]
        lines.append("")
    others = {level["concurrency"]: level for level in second["levels"]}
    shared = [level for level in first["levels"] if level["concurrency"] in others]
    if not shared:
        return [*lines, "The two reports share no level of concurrency."]
    for level in shared:
        a, b = level["summary"], others[level["concurrency"]]["summary"]
        rows = [[f"{level['concurrency']} concurrent", *names, "change"]]
        rows.append(["Completed", *(f"{one['completed']}/{one['requests']}" for one in (a, b)), ""])
        for key, name in RATES:
            if key in a and key in b:
                rows.append([name, *_compare(a[key], b[key])])
        for key, name in LATENCIES:
            for column in ("mean", "p50", "p99"):
                values = [one[key][column] if one[key] else None for one in (a, b)]
                label = column.upper() if column[0] == "p" else column
                rows.append([f"{name}, {label}, ms", *_compare(*values)])
        lines += [*format_rows(rows), ""]
    return lines[:-1]


def _compare(a: float | None, b: float | None) -> list[str]:
    change = f"{(b - a) / a:+.1%}" if a and b is not None else "-"
    return [show_number(a), show_number(b), change]

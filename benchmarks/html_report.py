"""The HTML report: one file, plots drawn as SVG, nothing fetched from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.report import LATENCIES, RATES, Report, format_level, show_number

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 12, 44
NUM_COLORS = 8
MAX_POINTS = 400

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --soft: #6a7078; --line: #dfe2e6;
  --c0: #2563eb; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #c2255c; --c5: #0c8599;
  --c6: #7c5e10; --c7: #495057; --bad: #c92a2a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #16181c; --soft: #9aa1ab;
  --line: #33373e; --c0: #74a7ff; --c1: #ff9466; --c2: #6fd488; --c3: #d89cf0; --c4: #f783ac;
  --c5: #66d9e8; --c6: #e0c063; --c7: #adb5bd; --bad: #ff8787; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1120px; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.soft { color: var(--soft); } .bad { color: var(--bad); font-weight: 600; }
.plots { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .25rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; overflow-wrap: normal; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } pre { overflow-x: auto; font-size: 13px; }
"""


@dataclass(frozen=True)
class Series:
    """One line of a plot."""

    name: str
    points: list[tuple[float, float]]
    has_marks: bool = True


def write_html(path: Path, report: Report) -> None:
    """Draw a report."""
    path.write_text(render_html(report), encoding="utf-8")


def render_html(report: Report) -> str:
    """The report as one page."""
    levels = report["levels"]
    settings = report["settings"]
    facts = ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in settings.items() if value is not None
    )
    failed = sum(level["summary"]["failed"] for level in levels)
    warning = (
        f'<p class="bad">{failed} request(s) failed: see the levels below.</p>' if failed else ""
    )
    plots = "".join(_figure(title, svg) for title, svg in _plots(levels))
    details = "".join(
        f"<h2>{level['concurrency']} concurrent</h2>"
        f"<pre>{escape(chr(10).join(format_level(level)))}</pre>"
        for level in levels
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Benchmark, {escape(report['started'])}</title><style>{STYLE}</style></head><body>"
        f"<h1>Benchmark of {escape(str(settings['url']))}</h1>"
        f'<p class="soft">{escape(report["started"])}. {escape(facts)}.</p>{warning}'
        f"{_table(levels)}<h2>Plots</h2><div class=plots>{plots}</div>{details}</body></html>\n"
    )


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _table(levels: Sequence[dict[str, Any]]) -> str:
    names = [name for key, name in RATES if key in levels[0]["summary"]]
    keys = [key for key, _ in RATES if key in levels[0]["summary"]]
    head = ["Concurrent", "Completed", *names]
    head += [f"{name}, {part}, ms" for _, name in LATENCIES for part in ("P50", "P99")]
    rows = []
    for level in levels:
        summary = level["summary"]
        cells = [str(level["concurrency"]), f"{summary['completed']}/{summary['requests']}"]
        cells += [show_number(summary[key]) for key in keys]
        for key, _ in LATENCIES:
            spread = summary[key] or {}
            cells += [show_number(spread.get(part)) for part in ("p50", "p99")]
        rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{header}</tr>{body}</table></div>'


def _plots(levels: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    plots = []
    rates = [
        Series(name, [(level["concurrency"], level["summary"][key]) for level in levels])
        for key, name in RATES[1:4]
    ]
    x_label = "concurrent requests"
    plots.append(("Throughput, tokens per second", draw(rates[:1], x_label)))
    plots.append(("Throughput with the input, tokens per second", draw(rates, x_label)))
    for key, name in LATENCIES:
        series = [
            Series(
                part.upper() if part[0] == "p" else part,
                [
                    (level["concurrency"], level["summary"][key][part])
                    for level in levels
                    if level["summary"][key]
                ],
            )
            for part in ("mean", "p50", "p90", "p99")
        ]
        plots.append((f"{name}, ms", draw(series, x_label)))
    for key, name in (LATENCIES[0], LATENCIES[2], LATENCIES[3]):
        series = [
            Series(f"{level['concurrency']} concurrent", _distribution(level, key), has_marks=False)
            for level in levels
        ]
        plots.append((f"{name}: share of samples at or below", draw(series, "ms", y_max=1.0)))
    return plots


def _distribution(level: dict[str, Any], key: str) -> list[tuple[float, float]]:
    samples: list[float] = []
    for request in level["requests"]:
        value = request.get(key)
        samples += value if isinstance(value, list) else [] if value is None else [value]
    samples.sort()
    step = max(1, len(samples) // MAX_POINTS)
    points = [(sample, (index + 1) / len(samples)) for index, sample in enumerate(samples)]
    thinned = points[::step]
    if points and thinned[-1] != points[-1]:
        thinned.append(points[-1])
    return [(points[0][0], 0.0), *thinned] if points else []


def draw(series: Sequence[Series], x_label: str, y_max: float | None = None) -> str:
    """A line plot with a legend; values from zero, since lengths must compare."""
    points = [point for one in series for point in one.points]
    if not points:
        return '<p class="soft">No completed request.</p>'
    x_low = min(x for x, _ in points)
    x_high = max(x for x, _ in points)
    if x_label == "ms":
        x_low = 0.0
    if x_high == x_low:
        x_low, x_high = x_low - 1, x_high + 1
    y_ticks = nice_ticks(y_max or max(y for _, y in points) or 1.0)
    y_high = y_max or y_ticks[-1]

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - y / y_high * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        y = at_y(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    x_ticks = (
        [tick for tick in nice_ticks(x_high) if tick <= x_high]
        if x_label == "ms"
        else sorted({x for x, _ in points})
    )
    for tick in x_ticks:
        x, y = at_x(tick), HEIGHT - BOTTOM + 18
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{tick:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    base = at_y(0)
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for index, one in enumerate(series):
        color = f"var(--c{index % NUM_COLORS})"
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in one.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for x, y in one.points if one.has_marks else ():
            parts.append(
                f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="4" fill="{color}">'
                f"<title>{escape(one.name)}, {x:g}: {show_number(y)}</title></circle>"
            )
    legend = " ".join(
        f'<span style="color:var(--c{index % NUM_COLORS})">&#9632;</span> {escape(one.name)}'
        for index, one in enumerate(series)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
        f'<div class="soft">{legend}</div>'
    )


def nice_ticks(high: float) -> list[float]:
    """About five round values from 0 that reach at least `high`."""
    rough = high / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    count = math.ceil(high / step - 1e-9)
    return [round(step * index, 12) for index in range(count + 1)]

"""From measurements to a table, for the terminal and for docs/benchmarks.md. No rank."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = (
    ("decode_tok_s", "decode, tok/s", 1),
    ("decode_1024_tok_s", "decode after 1,024", 1),
    ("prefill_tok_s", "prefill 1,024, tok/s", 0),
    ("batch_tok_s", "8 x (1,024 + 128): output tok/s", 1),
    ("batch_ttft_p50_s", "TTFT P50, s", 1),
    ("batch_itl_p50_ms", "ITL P50, ms", 0),
    ("memory_mib", "PSS, MiB", 0),
)
LESS_IS_BETTER = {"batch_ttft_p50_s", "batch_itl_p50_ms", "memory_mib"}


@dataclass(frozen=True)
class Row:
    """One server in one sitting."""

    name: str
    figures: Mapping[str, float]


def format_sitting(rows: Sequence[Row]) -> list[str]:
    """Markdown: our rows, the peer's, and the quotient of our first row and the peer's.

    A quotient above 1 means that ours is better, in each column.
    """
    ours, peer = rows[0], rows[-1]
    present = [column for column in COLUMNS if any(column[0] in row.figures for row in rows)]
    lines = [
        f"| server | {' | '.join(title for _, title, _ in present)} |",
        f"|---|{'---:|' * len(present)}",
    ]
    for row in rows:
        cells = [_show(row.figures.get(key), digits) for key, _, digits in present]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    ratios = [_ratio(ours.figures.get(key), peer.figures.get(key), key) for key, _, _ in present]
    lines.append(f"| ours : peer | {' | '.join(ratios)} |")
    return lines


def _show(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _ratio(ours: float | None, peer: float | None, key: str) -> str:
    if not ours or not peer:
        return ""
    value = peer / ours if key in LESS_IS_BETTER else ours / peer
    return f"**{value:.2f}**" if value >= 1 else f"{value:.2f}"


def describe_machine() -> str:
    """Processor, cores and memory in one line."""
    text = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    known = {"avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx512_bf16": "BF16", "amx_tile": "AMX"}
    features = [label for flag, label in known.items() if flag in flags]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return (
        f"{names[0] if names else platform.machine()} ({', '.join(features) or 'no AVX-512'}), "
        f"{len(names)} cores, {memory:.0f} GiB"
    )


def format_report(report: Mapping[str, Any]) -> str:
    """The whole report of one peer as markdown; also for a file read back."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{report['machine']}; {report['date']}; {report['ours']}; {versions}.",
        f"Shape {report['shape']}, random weights. `{report['command']}`",
    ]
    for sitting in report["sittings"]:
        rows = [Row(row["name"], row["figures"]) for row in sitting]
        lines += ["", *format_sitting(rows)]
        disturbed = [row["name"] for row in sitting if row["disturbed"]]
        if disturbed:
            lines.append(
                f"\nDisturbed by other work on the machine throughout: {', '.join(disturbed)}."
            )
    return "\n".join(lines)

"""From measurements to a table, for the terminal and for docs/benchmarks.md. No rank."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.results import Row, Table

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


def format_rows(rows: Sequence[Row]) -> list[str]:
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
    ratios = [compare(ours, peer, key) for key, _, _ in present]
    shown = ["" if ratio is None else _emphasize(ratio) for ratio in ratios]
    lines.append(f"| ours : peer | {' | '.join(shown)} |")
    return lines


def compare(ours: Row, peer: Row, key: str) -> float | None:
    """Ours to the peer's, above 1 where ours is better; none where a figure is missing."""
    one, other = ours.figures.get(key), peer.figures.get(key)
    if not one or not other:
        return None
    return other / one if key in LESS_IS_BETTER else one / other


def _show(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _emphasize(ratio: float) -> str:
    return f"**{ratio:.2f}**" if ratio >= 1 else f"{ratio:.2f}"


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


def format_table(table: Table) -> str:
    """A table as markdown, with all that is needed to run it again."""
    machine, ours, versions, shape = table.conditions
    lines = [
        f"{machine}; {', '.join(table.dates)}; {ours}; {versions}.",
        f"Shape {shape}, random weights.",
        *(f"`{command}`" for command in table.commands),
        "",
        *format_rows(table.rows),
    ]
    disturbed = [f"{row.name} ({', '.join(row.disturbed)})" for row in table.rows if row.disturbed]
    if disturbed:
        lines += ["", f"Disturbed by other work on the machine throughout: {', '.join(disturbed)}."]
    return "\n".join(lines)

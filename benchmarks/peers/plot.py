"""The tables as one picture: a pair of bars for each row of a peer in each panel. No rank.

SVG written by hand, with a background of its own and colours for light and for dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from benchmarks.peers.results import Row, Table

PANELS = (
    ("decode_tok_s", "decode, tokens/s", 1),
    ("decode_1024_tok_s", "decode after 1,024", 1),
    ("prefill_tok_s", "prefill of 1,024, tokens/s", 0),
    ("batch_tok_s", "8 at once, output tokens/s", 1),
    ("memory_mib", "memory, MiB (less is better)", 0),
)
LABELS, PANEL, VALUE, GAP = 196, 186, 44, 14  # widths; a panel's holds its longest bar and a number
TOP, BAR, SPACE, BOTTOM = 40, 15, 14, 34  # heights
LABEL_CLASSES = ("title", "soft")  # ours, the peer's
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1c1e21; } .soft { fill: #5c636c; }
.paper { fill: #fff; } .line { stroke: #dfe2e6; } .ours { fill: #2563eb; } .peer { fill: #a3abb5; }
.title { font-weight: 600; }
@media (prefers-color-scheme: dark) { text { fill: #e6e8eb; } .soft { fill: #9aa1ab; }
  .paper { fill: #16181c; } .line { stroke: #33373e; } .ours { fill: #5b93ff; }
  .peer { fill: #6b737d; } }
"""


def draw_tables(tables: Sequence[Table]) -> str:
    """Our first row and the peer's of each table; a panel for each figure that anybody has."""
    pairs = [(table.rows[0], table.rows[-1]) for table in tables]
    rows = [row for pair in pairs for row in pair]
    panels = [panel for panel in PANELS if any(panel[0] in row.figures for row in rows)]
    block = 2 * BAR + SPACE
    width = LABELS + len(panels) * (PANEL + GAP) + GAP
    height = TOP + len(pairs) * block + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img"><title>Our server beside others</title>'
        f'<style>{STYLE}</style><rect class="paper" width="{width}" height="{height}" rx="6"/>'
    ]
    for number in range(1, len(pairs)):
        y = TOP + number * block - SPACE / 2
        parts.append(f'<line class="line" x1="{GAP}" x2="{width - GAP}" y1="{y}" y2="{y}"/>')
    for number, pair in enumerate(pairs):
        for place, row in enumerate(pair):
            y = TOP + number * block + place * BAR + BAR - 3
            parts.append(
                f'<text x="{LABELS - 8}" y="{y}" class="{LABEL_CLASSES[place]}" text-anchor="end">'
                f"{escape(row.name.partition(',')[0])}</text>"
            )
    for index, panel in enumerate(panels):
        parts += draw_panel(LABELS + index * (PANEL + GAP), panel, pairs)
    machine = ", ".join(dict.fromkeys(table.conditions[0] for table in tables))
    shape = ", ".join(dict.fromkeys(table.conditions[3] for table in tables))
    note = f"Shape {shape}, random weights. {machine}. Ours: {layouts(pairs)}."
    parts.append(f'<text class="soft" x="{GAP}" y="{height - 12}">{escape(note)}</text></svg>')
    return "\n".join(parts) + "\n"


def draw_panel(x: int, panel: tuple[str, str, int], pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """One figure of all; lengths start at zero and compare within the panel."""
    key, title, digits = panel
    longest = max(row.figures.get(key, 0.0) for pair in pairs for row in pair)
    parts = [f'<text class="title" x="{x}" y="{TOP - 16}">{escape(title)}</text>']
    for number, pair in enumerate(pairs):
        for place, row in enumerate(pair):
            value = row.figures.get(key)
            if value is None:
                continue
            y = TOP + number * (2 * BAR + SPACE) + place * BAR
            length = value / longest * (PANEL - VALUE)
            parts.append(
                f'<rect class="{("ours", "peer")[place]}" x="{x}" y="{y}" width="{length:.1f}" '
                f'height="{BAR - 2}" rx="1"/>'
                f'<text x="{x + length + 5:.1f}" y="{y + BAR - 4}">{value:,.{digits}f}</text>'
            )
    return parts


def layouts(pairs: Sequence[tuple[Row, Row]]) -> str:
    """How ours were started, as their names say it."""
    return "; ".join(dict.fromkeys(ours.name.partition(", ")[2] for ours, _ in pairs))

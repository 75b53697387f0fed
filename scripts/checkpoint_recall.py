"""What other people's ways to quantize leave of the demo model. One process.

    python scripts/checkpoint_recall.py              print the table of docs/checkpoints.md
    python scripts/checkpoint_recall.py --write      put it there
    python scripts/checkpoint_recall.py --layouts gptq awq

The demo model is written in each layout by the writers of tests/model/quantized.py, which round to
the nearest code and do not calibrate: the producers' own quantizers do better. Recall and
perplexity are those of low_bit_recall.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.low_bit_recall import DEMO, measure  # noqa: E402
from tests.model.quantized import LAYOUTS, quantize_folder  # noqa: E402

PAGE = ROOT / "docs" / "checkpoints.md"
BEGIN, END = "<!-- table: scripts/checkpoint_recall.py -->", "<!-- end of recall table -->"
SHOWN = (
    *("fp8-block", "fp8-channel", "ct-w8a8", "ct-w4a16", "gptq", "gptq-channel-8-bits"),
    *("gptq-asymmetric", "awq", "bnb-nf4-nested"),
)
HEADER = "| checkpoint | becomes | recall | perplexity |\n|---|---|---:|---:|"


def main() -> None:
    """Measure each layout and print its line when it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", default=SHOWN, choices=LAYOUTS)
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    arguments = parser.parse_args()
    lines = [HEADER]
    for name in arguments.layouts:
        layout = LAYOUTS[name]
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "model"
            quantize_folder(layout, DEMO, folder)
            recall, perplexity = measure(None, folder)
        how = layout.becomes if layout.is_lossless else f"{layout.becomes}, converted again"
        lines.append(f"| {name} | `{how}` | {100 * recall:.1f} % | {perplexity:.2f} |")
        print(lines[-1], flush=True)
    if arguments.write:
        before, rest = PAGE.read_text().split(BEGIN)
        table = "\n".join(lines)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()

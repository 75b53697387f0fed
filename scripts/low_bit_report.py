"""Remake the table of docs/low_bit.md: size and error of every low-bit format. One process, CPU.

    python scripts/low_bit_report.py            print it
    python scripts/low_bit_report.py --write    put it into docs/low_bit.md
    python scripts/low_bit_report.py --speed    how fast weights are converted, there and back

The columns about ipex-llm are filled in the environment of requirements/ipex-llm.txt only.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from autotp_serving.kernels.ipex_llm import CPU_FORMATS, convert_linear  # noqa: E402
from autotp_serving.layers.low_bit_linear import LowBitLinear  # noqa: E402
from autotp_serving.low_bit.formats import FORMATS, Format  # noqa: E402
from autotp_serving.low_bit.numerics import decode  # noqa: E402
from autotp_serving.low_bit.tensor import dequantize, quantize  # noqa: E402

PAGE = ROOT / "docs" / "low_bit.md"
BEGIN, END = "<!-- table: scripts/low_bit_report.py -->", "<!-- end of table -->"
ROWS, COLS, NUM_TOKENS = 1024, 4096, 32
HEADER = """\
| format | bits per weight | weights, ours | weights, ipex-llm | matmul, ours | matmul, ipex-llm |
|---|---:|---:|---:|---:|---:|"""


def relative(value: Tensor, exact: Tensor) -> float:
    """Root mean square error relative to the root mean square."""
    return ((value.float() - exact).norm() / exact.norm()).item()


def native_weights(weight: Tensor, format: Format) -> Tensor:
    """`weight` quantized by ipex-llm's native library and read back, float32 `[rows, cols]`."""
    from tests.low_bit.make_golden import NativeLibrary
    from tests.low_bit.native_layout import read_blocks

    data = NativeLibrary("avx").quantize(weight.view(-1, 64).numpy(), format.name)
    parts = read_blocks(data, format.name)
    tensors = [None if part is None else torch.from_numpy(part) for part in parts]
    return decode(*tensors, format).view_as(weight)


def make_row(format: Format, weight: Tensor, x: Tensor, ipex_llm: bool) -> str:
    """One line of the table, errors in percent."""
    exact = x @ weight.T
    tensor = quantize(weight, format)
    errors: list[float | None] = [relative(dequantize(tensor), weight), None]
    errors += [relative(LowBitLinear(tensor)(x), exact), None]
    if ipex_llm:
        errors[1] = relative(native_weights(weight, format), weight)
        if format.name in CPU_FORMATS:
            module, model = nn.Linear(COLS, ROWS, bias=False), SimpleNamespace(model_type="llama")
            errors[3] = relative(convert_linear(module, weight, format.name, model)(x), exact)
    cells = ["-" if error is None else f"{100 * error:.2f} %" for error in errors]
    return f"| `{format.name}` | {format.bits_per_weight:g} | {' | '.join(cells)} |"


def make_table() -> str:
    """The whole table in Markdown, for normally distributed bfloat16 weights and activations."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLS, generator=generator).mul_(0.02).bfloat16().float()
    x = torch.randn(NUM_TOKENS, COLS, generator=generator).bfloat16().float()
    ipex_llm = importlib.util.find_spec("ipex_llm") is not None
    with torch.inference_mode():
        rows = [make_row(format, weight, x, ipex_llm) for format in FORMATS.values()]
    return "\n".join([HEADER, *rows])


def best_seconds(call: Callable[[], object]) -> float:
    """The shortest of eight runs in seconds of this process, which other work does not lengthen."""
    seconds = []
    for _ in range(8):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def print_speed() -> None:
    """GB of bfloat16 weights per second and core, to low-bit and back."""
    torch.set_num_threads(1)
    weight = torch.randn(2048, 4096).mul_(0.02).bfloat16()
    print("GB/s of bfloat16 per core: to low-bit, back")
    for format in FORMATS.values():
        tensor = quantize(weight, format)
        there = best_seconds(lambda format=format: quantize(weight, format))
        back = best_seconds(lambda tensor=tensor: dequantize(tensor, torch.bfloat16))
        print(
            f"{format.name:10} {weight.nbytes / there / 1e9:5.2f} {weight.nbytes / back / 1e9:5.2f}"
        )


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/low_bit.md")
    parser.add_argument("--speed", action="store_true", help="measure conversion instead")
    arguments = parser.parse_args()
    if arguments.speed:
        print_speed()
        return
    table = make_table()
    print(table)
    if arguments.write:
        before, rest = PAGE.read_text().split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()

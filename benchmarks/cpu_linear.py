"""Speed of the CPU's low-bit linear kernels beside torch's bf16 linear and the machine's limits.

    python -m benchmarks.cpu_linear [--threads 1] [--formats sym_int4,sym_int8] [--rows 1,8,64,1024]

One process, no ranks. Whatever is compared takes turns within the same seconds, and medians are
quoted, since machines are shared and their mood changes; with one thread its own time on the
processor counts, with several that of the clock. A small weight would stay in the cache
between calls, as it does not in a model: as many copies as fill `COLD` take turns. The bound of a
product is the longer of reading its weights once and its multiplications at the rate of torch's
best large bf16 product; 8-bit products can beat the latter. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from autotp_serving.devices import huge_pages
from autotp_serving.devices.build import build_library
from autotp_serving.kernels.cpu.linear import CpuMatmul
from autotp_serving.layers.low_bit_linear import LowBitLinear
from autotp_serving.low_bit.formats import FORMATS, Format
from autotp_serving.low_bit.tensor import quantize

# TinyLlama-1.1B's products, [rows, cols]: output projection, QKV, gate or up, down, head.
SHAPES = ((2048, 2048), (2560, 2048), (5632, 2048), (2048, 5632), (32000, 2048))
COLD = 64 * 2**20
READ_SOURCE = Path(__file__).parent / "native" / "memory_read.cpp"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    report: dict = {"threads": args.threads, "results": []}
    limits = Limits(args.threads)
    report |= {"read_gb_s": limits.read_rate(5), "bf16_gflop_s": limits.matmul_rate(5)}
    print(f"{args.threads} threads: read {report['read_gb_s']:.1f} GB/s in huge pages, ", end="")
    print(f"bf16 {report['bf16_gflop_s']:.0f} GFLOP/s")
    print(
        "format     rows   weight          us   GB/s  read now  of read  Gop/s  of bound  vs bf16"
    )
    for shape in args.shapes:
        dense = [torch.randn(shape).bfloat16() * 0.02]
        while len(dense) * dense[0].nbytes < COLD:
            dense.append(dense[0].clone())
        for name in args.formats:
            layers = make_layers(dense[0], FORMATS[name])
            for tokens in args.rows:
                result = measure(layers, dense, tokens, limits, args.repeats)
                result = {"format": name, "rows": tokens, "weight": list(shape)} | result
                report["results"].append(result)
                print_result(result)
    print(json.dumps(report))


def parse_arguments() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(word) for word in words(text)]

    def shapes(text: str) -> list[tuple[int, ...]]:
        return [tuple(map(int, word.split("x"))) for word in words(text)]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--formats", type=words, default=list(FORMATS))
    parser.add_argument("--rows", type=numbers, default=[1, 8, 64, 1024])
    parser.add_argument("--shapes", type=shapes, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


class Limits:
    """What the machine can do, measured with the same threads and in the same kind of memory."""

    def __init__(self, threads: int) -> None:
        library = ctypes.CDLL(str(build_library("memory_read", READ_SOURCE, ("-march=native",))))
        library.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        library.read_memory.restype = ctypes.c_uint64
        self._read = library.read_memory
        self._threads = threads
        ones = torch.ones(COLD // 8, dtype=torch.int64)
        self._memory = huge_pages.empty_like(ones).copy_(ones)
        self._square = torch.randn(1024, 2048).bfloat16()
        self._best_matmul = 0.0

    def read(self) -> None:
        """Read as much memory as the weights of a measurement fill."""
        self._read(self._memory.data_ptr(), self._memory.nbytes, self._threads)

    def read_rate(self, repeats: int) -> float:
        """GB/s, the median."""
        return COLD / statistics.median(take_times(self.read, repeats)) / 1e9

    def matmul_rate(self, repeats: int) -> float:
        """GFLOP/s of a bf16 product of 1024 x 2048 x 1024, the best so far."""
        seconds = min(take_times(lambda: self._square @ self._square.T, repeats))
        self._best_matmul = max(self._best_matmul, 2 * 1024 * 2048 * 1024 / seconds / 1e9)
        return self._best_matmul


def make_layers(weight: Tensor, format: Format) -> list[LowBitLinear]:
    """As many layers as fill `COLD`."""
    tensor = quantize(weight, format)
    layers = [LowBitLinear(tensor)]
    while len(layers) * tensor.num_bytes < COLD:
        layers.append(LowBitLinear(tensor))
    return layers


def measure(
    layers: list[LowBitLinear], dense: list[Tensor], tokens: int, limits: Limits, repeats: int
) -> dict[str, float | bool]:
    """Medians of our kernel, torch's bf16 linear and a plain read, taking turns."""
    rows, cols = layers[0].weight.shape
    x = torch.randn(tokens, cols).bfloat16()
    # With many tokens the product is long and a weight that is still in the cache no help.
    layers, dense = (layers[:1], dense[:1]) if tokens > 16 else (layers, dense)

    def run_layers() -> None:
        for layer in layers:
            layer(x)

    def run_dense() -> None:
        for weight in dense:
            torch.nn.functional.linear(x, weight)

    times: dict[Callable[[], None], list[float]] = {
        run_layers: [],
        run_dense: [],
        limits.read: [],
    }
    for run in times:
        run()
    for _ in range(repeats):
        for run, taken in times.items():
            taken += take_times(run, 1)
    ours, theirs, read = (statistics.median(taken) for taken in times.values())
    ours, theirs, read_rate = ours / len(layers), theirs / len(dense), COLD / read
    num_bytes, operations = layers[0].weight.num_bytes, 2 * tokens * rows * cols
    bound = max(num_bytes / read_rate, operations / limits.matmul_rate(1) / 1e9)
    return {
        "us": ours * 1e6,
        "gb_s": num_bytes / ours / 1e9,
        "read_gb_s": read_rate / 1e9,
        "of_read": num_bytes / ours / read_rate,
        "gop_s": operations / ours / 1e9,
        "of_bound": bound / ours,
        "bf16_us": theirs * 1e6,
        "speed_up_over_bf16": theirs / ours,
        "portable": not isinstance(layers[0].matmul, CpuMatmul),
    }


def take_times(run: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each call."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return times


def print_result(result: dict) -> None:
    """One line of the table."""
    weight = "x".join(map(str, result["weight"]))
    print(
        f"{result['format']:9} {result['rows']:5}  {weight:11} {result['us']:8.0f} "
        f"{result['gb_s']:6.1f} {result['read_gb_s']:9.1f} {result['of_read']:8.0%} "
        f"{result['gop_s']:6.0f} {result['of_bound']:9.0%} {result['speed_up_over_bf16']:8.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()

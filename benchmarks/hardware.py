"""What this machine can do at most: memory bandwidth and matmul rate. Every rank, all together.

The ranks measure at the same moment, as they work at the same moment, and their rates are added
up. The best of a few tries counts: a bound should not sink because a neighbour was busy.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from autotp_serving.devices.build import build_library
from autotp_serving.distributed.launch import RankGroup

READ_BYTES = 2**29  # far more than any cache of a few cores
MATMUL_SIZES = {"cpu": (1024, 2048, 2048), "cuda": (8192, 8192, 8192), "xpu": (4096, 4096, 4096)}
SECONDS = 0.5
READ_SOURCE = Path(__file__).parent / "native" / "memory_read.cpp"


@dataclass(frozen=True)
class Hardware:
    """Rates of all ranks together, per second; `int8` is None where torch has no such product."""

    device: str
    num_ranks: int
    threads: int
    read_bytes: float
    bf16_operations: float
    int8_operations: float | None

    def describe(self) -> str:
        """One line."""
        rates = [f"reads {self.read_bytes / 1e9:.1f} GB/s"]
        rates.append(f"multiplies {self.bf16_operations / 1e12:.2f} TFLOP/s in bf16")
        if self.int8_operations:
            rates.append(f"{self.int8_operations / 1e12:.2f} TOP/s in int8")
        threads = f" x {self.threads} thread(s)" if self.device == "cpu" else ""
        return f"{self.device}, {self.num_ranks} rank(s){threads}: {', '.join(rates)}"


def measure_hardware(group: RankGroup, kind: str, device: torch.device) -> Hardware:
    """Measure; every rank must call it."""
    if kind == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // group.local_size))  # as a rank will
    group.all_gather("measure")
    read = _read_rate(kind, device)
    group.all_gather("next")
    bf16 = _matmul_rate(kind, device, torch.bfloat16)
    group.all_gather("next")
    int8 = _matmul_rate(kind, device, torch.int8)
    rates = group.all_gather((read, bf16, int8))
    # Before torchrun's ranks can talk to each other there is only this one's word.
    scale = group.size / len(rates)
    whole = [sum(column) * scale if all(column) else None for column in zip(*rates, strict=True)]
    return Hardware(kind, group.size, torch.get_num_threads(), *whole)


def _best_seconds(kind: str, run: Callable[[], object]) -> float:
    """Shortest time of a call within a moment of trying."""
    wait: Callable[[], None] = getattr(torch, kind).synchronize if kind != "cpu" else lambda: None
    run()
    wait()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def _read_rate(kind: str, device: torch.device) -> float:
    ones = torch.ones(READ_BYTES // 8, dtype=torch.int64, device=device)
    if kind != "cpu":
        target = torch.empty_like(ones)
        return 2 * READ_BYTES / _best_seconds(kind, lambda: target.copy_(ones))
    library = ctypes.CDLL(str(build_library("memory_read", READ_SOURCE, ("-march=native",))))
    library.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    threads = torch.get_num_threads()
    return READ_BYTES / _best_seconds(
        kind, lambda: library.read_memory(ones.data_ptr(), READ_BYTES, threads)
    )


def _matmul_rate(kind: str, device: torch.device, dtype: torch.dtype) -> float | None:
    rows, inner, cols = MATMUL_SIZES[kind]
    if dtype == torch.int8:
        a = torch.ones((rows, inner), dtype=dtype, device=device)
        b = torch.ones((cols, inner), dtype=dtype, device=device).T
        try:
            seconds = _best_seconds(kind, lambda: torch._int_mm(a, b))
        except (RuntimeError, AttributeError):
            return None
    else:
        a = torch.randn((rows, inner), device=device).to(dtype)
        b = torch.randn((inner, cols), device=device).to(dtype)
        seconds = _best_seconds(kind, lambda: a @ b)
    return 2 * rows * inner * cols / seconds

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

from autotp_serving.devices import Device
from autotp_serving.devices.build import build_library
from autotp_serving.distributed.launch import RankGroup

READ_BYTES = 2**29  # far more than any cache of a few cores
MATMUL_SIZES = {"cpu": (1024, 2048, 2048), "cuda": (8192, 8192, 8192), "xpu": (4096, 4096, 4096)}
SECONDS = 0.5
READ_SOURCE = Path(__file__).parent / "native" / "memory_read.cpp"


@dataclass(frozen=True)
class Hardware:
    """Rates of all ranks together, per second.

    Attributes:
        threads: of each rank; None where a card does the work.
        int8_operations: None where torch has no such product.
    """

    device: str
    num_ranks: int
    threads: int | None
    read_bytes: float
    bf16_operations: float
    int8_operations: float | None

    def describe(self) -> str:
        """One line."""
        rates = [f"reads {self.read_bytes / 1e9:.1f} GB/s"]
        rates.append(f"multiplies {self.bf16_operations / 1e12:.2f} TFLOP/s in bf16")
        if self.int8_operations:
            rates.append(f"{self.int8_operations / 1e12:.2f} TOP/s in int8")
        threads = f" x {self.threads} thread(s)" if self.threads else ""
        return f"{self.device}, {self.num_ranks} rank(s){threads}: {', '.join(rates)}"


def measure_hardware(group: RankGroup, device: Device) -> Hardware:
    """Measure; every rank must call it."""
    if device.is_host and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // group.local_size))  # as a rank will
    group.all_gather("measure")
    read = _read_rate(device)
    group.all_gather("next")
    bf16 = _matmul_rate(device, torch.bfloat16)
    group.all_gather("next")
    int8 = _matmul_rate(device, torch.int8)
    rates = group.all_gather((read, bf16, int8))
    # Before torchrun's ranks can talk to each other there is only this one's word.
    scale = group.size / len(rates)
    whole = [sum(column) * scale if all(column) else None for column in zip(*rates, strict=True)]
    threads = torch.get_num_threads() if device.is_host else None
    return Hardware(device.kind, group.size, threads, *whole)


def _best_seconds(device: Device, run: Callable[[], object]) -> float:
    """Shortest time of a call within a moment of trying."""
    run()
    device.synchronize()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _read_rate(device: Device) -> float:
    ones = torch.ones(READ_BYTES // 8, dtype=torch.int64, device=device.torch_device)
    if not device.is_host:
        target = torch.empty_like(ones)
        return 2 * READ_BYTES / _best_seconds(device, lambda: target.copy_(ones))
    library = ctypes.CDLL(str(build_library("memory_read", READ_SOURCE, ("-march=native",))))
    library.read_memory.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    threads = torch.get_num_threads()
    return READ_BYTES / _best_seconds(
        device, lambda: library.read_memory(ones.data_ptr(), READ_BYTES, threads)
    )


def _matmul_rate(device: Device, dtype: torch.dtype) -> float | None:
    rows, inner, cols = MATMUL_SIZES[device.kind]
    where = device.torch_device
    if dtype == torch.int8:
        a = torch.ones((rows, inner), dtype=dtype, device=where)
        b = torch.ones((cols, inner), dtype=dtype, device=where).T
        try:
            seconds = _best_seconds(device, lambda: torch._int_mm(a, b))
        except (RuntimeError, AttributeError):
            return None
    else:
        a = torch.randn((rows, inner), device=where).to(dtype)
        b = torch.randn((inner, cols), device=where).to(dtype)
        seconds = _best_seconds(device, lambda: a @ b)
    return 2 * rows * inner * cols / seconds

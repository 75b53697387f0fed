"""Timing on a GPU: graph replays, the card's own copy rate, kernels compiled in parallel."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch

COPY_BYTES = 2**32


def time_graph(work: Callable[[], object], repeats: int = 15) -> float:
    """Seconds of `work` as the replay of a CUDA graph: the median, after two replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for index in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if index >= 2:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measure_copy_rate() -> float:
    """Bytes a second of the fastest of some large copies, reads and writes counted."""
    source = torch.empty(COPY_BYTES // 4, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * COPY_BYTES / min(times)


def compile_in_parallel(
    launch: Callable[..., object],
    jobs: Iterable[tuple],
    target: tuple[str, int, int],
    processes: int,
) -> list[str]:
    """Fill Triton's cache on disk with the kernels that `launch(*job)` would start.

    To be called before the card is used: the processes are forks, and they use tensors on the CPU.

    Args:
        target: backend, architecture and threads of a warp, as ("cuda", 90, 32).

    Returns:
        What did not compile, and why.
    """
    jobs = list(jobs)
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        work = [(launch, job, target) for job in jobs]
        return [message for message in pool.imap_unordered(_compile, work) if message]


def _compile(work: tuple[Callable[..., object], tuple, tuple[str, int, int]]) -> str:
    """Compile one job's kernels for a target that need not be here."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launch, job, target = work
    fake = SimpleNamespace(
        get_current_target=lambda: GPUTarget(*target),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
    )
    getattr(driver, "driver", driver).set_active(fake)
    JITFunction.__getitem__ = lambda kernel, grid: (
        lambda *args, **options: kernel.run(*args, grid=grid, warmup=True, **options)
    )
    try:
        launch(*job)
    except Exception as error:
        return f"{job}: {type(error).__name__}: {error}"[:400]
    return ""

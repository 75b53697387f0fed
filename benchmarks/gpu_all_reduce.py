"""All-reduce between CUDA cards inside a CUDA graph, alone and with the norm. Every rank.

    torchrun --nproc-per-node 2 benchmarks/gpu_all_reduce.py

Checks each sum on random numbers, then times replays of a graph of 64 sums, as a 7 B model's decode
step has them: by NCCL, by symmetric memory, and by either with a norm of rows of 4,096 after it,
beside one kernel that does both. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from autotp_serving.distributed.symmetric_memory import (
    LARGEST_BYTES,
    SymmetricAllReduce,
    share,
)
from autotp_serving.kernels.cuda.activations import Rounding
from autotp_serving.kernels.cuda.norms import TURNS, Inboxes, add_rms_norm

SUMS = 64
REPLAYS = 20
SIZE = 4096
SIZES = [2**n for n in range(13, 25)]


def time_graph(all_reduce: Callable[[Tensor], Tensor], tensor: Tensor) -> float:
    """Microseconds of one sum in a graph of `SUMS` of them, the median of replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            all_reduce(tensor)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(SUMS):
            all_reduce(tensor)
    times = []
    for _ in range(REPLAYS):
        tensor.zero_()
        dist.barrier()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / SUMS)
    return statistics.median(times)


def check(all_reduce: Callable[[Tensor], Tensor], num_numbers: int, rank: int, size: int) -> float:
    """Largest difference from a float32 sum, relative to the largest number."""
    device = torch.device("cuda", torch.cuda.current_device())
    worst = 0.0
    for seed in range(5):
        parts = [
            torch.randn(num_numbers, generator=torch.Generator().manual_seed(seed * size + other))
            for other in range(size)
        ]
        exact = sum(part.bfloat16().float() for part in parts)
        mine = parts[rank].bfloat16().to(device)
        found = all_reduce(mine).float().cpu()
        worst = max(worst, float((found - exact).abs().max() / exact.abs().max()))
    return worst


def main() -> None:
    """Print one line a size on rank 0."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device())
    symmetric = SymmetricAllReduce(dist.group.WORLD, device, torch.bfloat16)
    shape = (TURNS, size, SIZES[-1] // (2 * SIZE), SIZE)
    inboxes = Inboxes.make(*share(shape, torch.bfloat16, device, dist.group.WORLD), rank)
    weight = torch.ones(SIZE, dtype=torch.bfloat16, device=device)
    dist.barrier()

    def nccl(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    rows = []
    for num_bytes in SIZES:
        tensor = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=device)
        row = {"bytes": num_bytes, "nccl_us": round(time_graph(nccl, tensor), 2)}
        if num_bytes <= LARGEST_BYTES:
            assert symmetric.takes(tensor)
            row["error"] = check(symmetric, num_bytes // 2, rank, size)
            row["symmetric_us"] = round(time_graph(symmetric, tensor), 2)
        tensor = tensor.view(-1, SIZE)
        hidden = torch.zeros_like(tensor)

        def add_norm(
            part: Tensor,
            reduce: Callable[[Tensor], Tensor] | None,
            inboxes: Inboxes | None = None,
            hidden: Tensor = hidden,
        ) -> Tensor:
            part = part if reduce is None else reduce(part)
            add_rms_norm(hidden, part, weight, 1e-5, Rounding.NONE, None, inboxes)
            return part

        quickest = symmetric if num_bytes <= LARGEST_BYTES else nccl
        row["sum_and_norm_us"] = round(time_graph(partial(add_norm, reduce=quickest), tensor), 2)
        fused = partial(add_norm, reduce=None, inboxes=inboxes)
        row["one_kernel_us"] = round(time_graph(fused, tensor), 2)
        row["norm_us"] = round(time_graph(partial(add_norm, reduce=None), tensor), 2)
        rows.append(row)
        if rank == 0:
            print(row, flush=True)
    if rank == 0:
        print(json.dumps({"card": torch.cuda.get_device_name(), "ranks": size, "rows": rows}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

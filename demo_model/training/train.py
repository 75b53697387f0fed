"""Trains the demo model for a given number of minutes on one or several GPUs.

    torchrun --nproc-per-node 2 train.py --corpus corpus.npz --model folder --minutes 9

The learning rate follows the clock, so a run always ends with its decay complete, however fast
the machine is.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from batches import Corpus, batches
from export import export, load_exported
from model import Llama, Shape
from optimizer import Optimizer

SYNC_EVERY = 20  # steps between two looks at the clock


def rate_at(progress: float, warmup: float) -> float:
    """Linear warm-up, then linear decay to zero, over a run's progress from 0 to 1."""
    return min(progress / warmup, (1 - progress) / (1 - warmup), 1.0)


class Clock:
    """The run's progress, the same on every rank: rank 0's watch, read every few steps."""

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.seconds, self.device = seconds, device
        self.begin = time.perf_counter()
        self.progress = self.per_step = self.reading = 0.0

    def tick(self, step: int) -> float:
        """Progress at this step; between two readings it is extrapolated."""
        if step % SYNC_EVERY:
            self.progress += self.per_step
        elif step:
            elapsed = (time.perf_counter() - self.begin) / self.seconds
            shared = torch.tensor([elapsed], dtype=torch.float64, device=self.device)
            if dist.is_initialized():
                dist.broadcast(shared, 0)
            self.progress = float(shared)
            self.per_step = (self.progress - self.reading) / SYNC_EVERY
            self.reading = self.progress
        return min(self.progress, 1.0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--batch-tokens", type=int, default=32768, help="a step, all ranks")
    parser.add_argument("--short", type=int, default=512, help="usual row length")
    parser.add_argument("--long", type=int, default=4096, help="length of the long rows")
    parser.add_argument("--long-share", type=float, default=0.12, help="of all entries")
    parser.add_argument("--matrix-rate", type=float, default=0.01, help="Muon's learning rate")
    parser.add_argument("--vector-rate", type=float, default=0.002, help="AdamW's learning rate")
    parser.add_argument("--decay", type=float, default=0.0, help="weight decay of the matrices")
    parser.add_argument("--warmup", type=float, default=0.01, help="share of the run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="exported folder whose weights to start from")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    model = Llama(Shape())
    if args.resume:
        load_exported(model, args.resume)
    model.to(device)
    forward = model if args.no_compile else torch.compile(model, dynamic=False)
    optimizer = Optimizer(model, args.decay, not args.no_compile)
    corpus = Corpus(args.corpus, device)
    stream = batches(
        corpus, rank, world, args.batch_tokens, args.short, args.long, args.long_share, args.seed
    )

    def log(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    def gradient(rows: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This batch's mean gradient over all ranks, as one vector, and its definition loss."""
        loss, definition_loss = forward(rows, weights)
        flat = optimizer.pack(torch.autograd.grad(loss, tuple(optimizer.params.values())))
        if world > 1:
            dist.all_reduce(flat)
            flat /= world
        return flat, definition_loss

    def update(flat: torch.Tensor, rate: float, correction: float) -> None:
        scalars = (args.matrix_rate * rate, args.vector_rate * rate, correction)
        optimizer.update(flat, *(torch.tensor(s, device=device) for s in scalars))

    begin = time.perf_counter()
    if not args.no_compile:  # both row lengths and the optimizer, before the clock runs
        seen = set()
        for rows, weights in stream:
            if rows.shape not in seen:
                flat, _ = gradient(rows, weights)
                seen.add(rows.shape)
            if len(seen) == 2 or args.long_share == 0:
                break
        update(flat, 0.0, 1.0)
        log(f"compiled in {time.perf_counter() - begin:.0f} s")

    clock = Clock(args.minutes * 60, device)
    trained, losses, last = 0, [], time.perf_counter()
    for step, (rows, weights) in enumerate(stream):
        progress = clock.tick(step)
        if progress >= 1:
            break
        flat, loss = gradient(rows, weights)
        update(flat, rate_at(progress, args.warmup), 1 - 0.99 ** (step + 1))
        trained += (rows.shape[1] - 1) * rows.shape[0] * world
        losses.append(loss)
        if time.perf_counter() - last > 5:
            last = time.perf_counter()
            mean = torch.stack(losses).mean().item()
            largest = max(p.abs().max().item() for p in optimizer.params.values())
            pace = trained / (last - clock.begin)
            log(
                f"{progress:6.1%}  step {step}  {trained / 1e6:.0f} M tokens  {pace / 1e6:.2f} M/s"
                f"  definition loss {mean:.4f}  largest weight {largest:.2f}"
            )
            losses = []

    log(f"trained on {trained / 1e6:.0f} M tokens in {time.perf_counter() - begin:.0f} s")
    if rank == 0:
        export(model, args.model)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

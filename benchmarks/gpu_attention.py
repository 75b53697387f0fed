"""Speed of the Triton attention kernels on this machine's card, beside what the card can do.

    python -m benchmarks.gpu_attention [--shapes 32x32x128,32x8x128] [--rows 1,8,32,128]
        [--context 1060] [--prompts 1x1024,1x4096] [--block-size 16] [--int8] [--tune]

Builds the variants in parallel, checks each against attention in float32, times it as the replay
of a graph over contexts that do not stay in the cache, and prints its share of the card's own copy
rate (decode) or its TFLOP/s beside torch's attention (prefill). With --tune many tiles are tried,
else those of `kernels/triton/cards.py`. One process, one card.
"""

from __future__ import annotations

import argparse
import itertools
import os
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from autotp_serving.kernels.kv_pools import Pools
from autotp_serving.kernels.triton import decode as decode_kernels
from autotp_serving.kernels.triton import prefill as prefill_kernels
from autotp_serving.kernels.triton.cards import (
    HOPPER,
    DecodeTiles,
    PrefillTiles,
    choose_decode,
    choose_prefill,
)
from autotp_serving.kernels.triton.store import store
from benchmarks.gpu_timing import compile_in_parallel, measure_copy_rate, time_graph

TOLERANCE = 0.02
"""Of the largest difference from float32, as a share of the largest number, in bf16."""
TARGET = ("cuda", 90, 32)
POOL_BYTES = 3 * 2**30
"""Of keys and values that steps take turns in, so that they do not stay in the cache."""


@dataclass(frozen=True)
class Shape:
    """Heads of one layer, and its cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_int8: bool
    block_size: int

    @property
    def token_bytes(self) -> int:
        """What attention reads for one token of a context."""
        size = self.head_dim + 4 if self.is_int8 else self.head_dim * 2
        return 2 * self.num_kv_heads * size

    def __str__(self) -> str:
        cache = "int8" if self.is_int8 else "bf16"
        heads = f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}"
        return f"{heads}, {cache} cache, blocks of {self.block_size}"


@dataclass(frozen=True)
class Contexts:
    """Sequences of one length in a shuffled cache."""

    shape: Shape
    context_len: int
    pools: Pools
    block_tables: Tensor

    def inputs(self, first: int, num_seqs: int, query_len: int) -> SimpleNamespace:
        """A step of `num_seqs` sequences from `first` on, with their last `query_len` tokens."""
        count = {"dtype": torch.int32, "device": self.block_tables.device}
        return SimpleNamespace(
            rows=torch.arange(first, first + num_seqs, **count),
            query_starts=torch.arange(num_seqs + 1, **count) * query_len,
            context_lens=torch.full((num_seqs,), self.context_len, **count),
            block_tables=self.block_tables,
            num_seqs=num_seqs,
            num_tokens=num_seqs * query_len,
            max_query_len=query_len,
            is_decode=query_len == 1,
        )

    def read(self, seq: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence, [context_len, num_kv_heads, head_dim] float32."""
        offsets = torch.arange(self.shape.block_size, device=self.block_tables.device)
        slots = self.block_tables[seq].long()[:, None] * self.shape.block_size + offsets
        key, value = self.pools.read(slots.flatten()[: self.context_len], torch.float32)
        return key.float(), value.float()


def make_contexts(shape: Shape, num_seqs: int, context_len: int, device: str) -> Contexts:
    """Random keys and values, in blocks at random places; unfilled on a CPU."""
    blocks = -(-context_len // shape.block_size)
    num_slots = num_seqs * blocks * shape.block_size
    size = (num_slots, shape.num_kv_heads, shape.head_dim)
    dtype = torch.int8 if shape.is_int8 else torch.bfloat16
    tensors = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
    if shape.is_int8:
        tensors += [torch.empty(size[:2], dtype=torch.float32, device=device) for _ in range(2)]
    pools = Pools(*tensors)
    for start in range(0, 0 if pools.keys.is_cpu else num_slots, 2**15):
        slots = torch.arange(start, min(start + 2**15, num_slots), device=device)
        rows = torch.randn((2, len(slots), *size[1:]), dtype=torch.bfloat16, device=device)
        store(rows[0], rows[1], slots, pools)
    order = torch.randperm(num_seqs * blocks, device=device).to(torch.int32)
    return Contexts(shape, context_len, pools, order.view(num_seqs, blocks))


def make_query(shape: Shape, num_tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """Random queries, and a poisoned output."""
    size = (num_tokens, shape.num_heads, shape.head_dim)
    query = torch.randn(size, dtype=torch.bfloat16, device=device)
    return query, torch.full_like(query, float("nan"))


def run_decode(
    contexts: Contexts,
    inputs: SimpleNamespace,
    query: Tensor,
    out: Tensor,
    tiles: DecodeTiles,
    workspace: decode_kernels.DecodeWorkspace,
) -> None:
    """One launch of decode attention."""
    decode_kernels.decode(
        query, contexts.pools, inputs, out, workspace, tiles, contexts.shape.block_size,
        contexts.shape.head_dim**-0.5, None, None, None,
    )  # fmt: skip


def run_prefill(
    contexts: Contexts, inputs: SimpleNamespace, query: Tensor, out: Tensor, tiles: PrefillTiles
) -> None:
    """One launch of prefill attention."""
    prefill_kernels.prefill(
        query, contexts.pools, inputs, out, tiles, contexts.shape.block_size,
        contexts.shape.head_dim**-0.5, None, None, None, skips_single=False,
    )  # fmt: skip


def launch_once(shape: Shape, tiles: DecodeTiles | PrefillTiles) -> None:
    """Start a variant on two short sequences on the CPU, for its kernels to be compiled."""
    contexts = make_contexts(shape, 2, 64, "cpu")
    query_len = 1 if isinstance(tiles, DecodeTiles) else 64
    query, out = make_query(shape, 2 * query_len, "cpu")
    inputs = contexts.inputs(0, 2, query_len)
    if isinstance(tiles, DecodeTiles):
        sizes = (2, shape.num_heads, shape.head_dim, tiles, torch.device("cpu"))
        workspace = decode_kernels.allocate_workspace(*sizes)
        run_decode(contexts, inputs, query, out, tiles, workspace)
    else:
        run_prefill(contexts, inputs, query, out, tiles)


def list_decode_tiles(shape: Shape, is_tuning: bool) -> list[DecodeTiles]:
    """The card's own, the same without splits (right for many rows), and what else is tried."""
    group = shape.num_heads // shape.num_kv_heads
    own = choose_decode(HOPPER, group, shape.head_dim, shape.is_int8)
    found = [own, replace(own, min_split=4096, max_splits=1)]
    if is_tuning:
        splits = ((64, 16), (64, 32), (128, 16), (4096, 1))
        sizes = ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4))
        paths = (True, False) if group == 1 or shape.is_int8 else (True,)
        for (tile, warps), stages, use_dot in itertools.product(sizes, (1, 2, 3), paths):
            if stages == 3 and (shape.is_int8 or not use_dot):
                continue
            found += [
                DecodeTiles(tile, warps, stages, max(least, tile), most, use_dot, group == 1)
                for least, most in splits
            ]
    return list(dict.fromkeys(found))


def list_prefill_tiles(shape: Shape, is_tuning: bool) -> list[PrefillTiles]:
    """The card's own first, then what else is tried."""
    found = [choose_prefill(HOPPER, shape.head_dim, shape.is_int8)]
    if is_tuning:
        sizes = ((64, 4), (128, 8))
        for (queries, warps), keys, stages in itertools.product(sizes, (32, 64), (1, 2)):
            found.append(PrefillTiles(queries, keys, warps, stages))
    return list(dict.fromkeys(found))


def attend_exactly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of the last queries [n, heads, dim] of a context, in float32."""
    group = query.shape[1] // key.shape[1]
    query = query.float().transpose(0, 1)
    key, value = (rows.repeat_interleave(group, 1).transpose(0, 1) for rows in (key, value))
    logits = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    positions = torch.arange(key.shape[1], device=query.device)
    seen = positions <= positions[key.shape[1] - query.shape[1] :, None]
    return (logits.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(0, 1)


def is_wrong(out: Tensor, exact: Tensor) -> bool:
    """Whether some number is not near float32's, or was not written."""
    return not ((out.float() - exact).abs().max() / exact.abs().max()).item() < TOLERANCE


def describe(tiles: DecodeTiles | PrefillTiles) -> str:
    """A variant in one word."""
    if isinstance(tiles, PrefillTiles):
        return f"{tiles.queries}x{tiles.keys} warps={tiles.warps} stages={tiles.stages}"
    path = "dot" if tiles.use_dot else "sum"
    merge = "same" if tiles.merges else "own"
    sizes = f"tile={tiles.tile} warps={tiles.warps} stages={tiles.stages}"
    return f"{path} {sizes} split={tiles.min_split}/{tiles.max_splits} merge={merge}"


def measure_decode(
    shape: Shape, variants: list[DecodeTiles], rows: list[int], context_len: int, copy_rate: float
) -> None:
    """Print each variant's microseconds and share of the copy rate for each number of rows."""
    print(f"\ndecode, {shape}, context {context_len}: us (share of the copy rate) at {rows} rows")
    num_bytes = shape.token_bytes * context_len
    max_rows = max(*rows, -(-POOL_BYTES // num_bytes))
    contexts = make_contexts(shape, max_rows, context_len, "cuda")
    results = {}
    for tiles in variants:
        times = []
        sizes = (max_rows, shape.num_heads, shape.head_dim, tiles, torch.device("cuda"))
        workspace = decode_kernels.allocate_workspace(*sizes)
        for num_rows in rows:
            steps = [
                contexts.inputs(first, num_rows, 1)
                for first in range(0, max_rows - num_rows + 1, num_rows)
            ][:32]
            steps *= -(-4 // len(steps))
            query, out = make_query(shape, num_rows, "cuda")

            def run(arguments: tuple = (query, out, tiles, workspace), steps: list = steps) -> None:
                for step in steps:
                    run_decode(contexts, step, *arguments)

            try:
                run()
                last = int(steps[-1].rows[-1])
                exact = attend_exactly(query[-1:], *contexts.read(last))
                times.append(time_graph(run) / len(steps))
                if is_wrong(out[-1:], exact):
                    print("WRONG", describe(tiles), num_rows)
            except Exception as error:
                print("FAILED", describe(tiles), num_rows, str(error)[:200])
                break
        if len(times) == len(rows):
            results[tiles] = times
    shares = {
        tiles: [
            count * num_bytes / seconds / copy_rate
            for count, seconds in zip(rows, times, strict=True)
        ]
        for tiles, times in results.items()
    }
    for tiles, found in shares.items():
        cells = [
            f"{seconds * 1e6:8.2f} ({share:4.0%})"
            for seconds, share in zip(results[tiles], found, strict=True)
        ]
        print(" ".join(cells), describe(tiles))
    for column, count in enumerate(rows):
        best = sorted(shares, key=lambda tiles: -shares[tiles][column])[:4]
        print(f"best at {count}:", *(f"{shares[t][column]:.1%} {describe(t)};" for t in best))
    top = [max(found[column] for found in shares.values()) for column in range(len(rows))]

    def worst_share(tiles: DecodeTiles) -> float:
        return min(share / best for share, best in zip(shares[tiles], top, strict=True))

    for tiles in sorted(shares, key=worst_share, reverse=True)[:5]:
        of_best = [f"{share / best:.0%}" for share, best in zip(shares[tiles], top, strict=True)]
        print("of the best:", *of_best, describe(tiles))


def measure_prefill(
    shape: Shape, variants: list[PrefillTiles], prompts: list[tuple[int, int]], prefix: int
) -> None:
    """Print TFLOP/s of each variant and of torch's attention where it can do the same."""
    for count, length in prompts:
        context_len = prefix + length
        contexts = make_contexts(shape, count, context_len, "cuda")
        inputs = contexts.inputs(0, count, length)
        query, out = make_query(shape, count * length, "cuda")
        seen = length * prefix + length * (length + 1) / 2
        batch = (contexts, inputs, query, out)
        operations = 4 * count * seen * shape.num_heads * shape.head_dim
        print(f"\nprefill, {shape}, {count} x {length} after {prefix}")
        exact = attend_exactly(query[-length:][-256:], *contexts.read(count - 1))
        for tiles in variants:
            out.fill_(float("nan"))
            try:
                seconds = time_graph(lambda job=(*batch, tiles): run_prefill(*job))
            except Exception as error:
                print("FAILED", describe(tiles), str(error)[:200])
                continue
            mark = "WRONG" if is_wrong(out[-256:], exact) or out.isnan().any() else ""
            rate = operations / seconds / 1e12
            print(f"{seconds * 1e6:9.1f} us {rate:6.1f} TFLOP/s {describe(tiles)} {mark}")
        if prefix == 0:
            measure_torch(shape, query, count, length, operations)


def measure_torch(shape: Shape, query: Tensor, count: int, length: int, operations: float) -> None:
    """Torch's own kernels on fresh prompts of one length."""
    size = (count, length, shape.num_kv_heads, shape.head_dim)
    key, value = (torch.randn(size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    rows = [
        part.view(count, length, -1, shape.head_dim).transpose(1, 2) for part in (query, key, value)
    ]
    runs = {
        backend.name: lambda backend=backend: attend_by_torch(rows, backend)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    }
    try:
        from torch.nn.attention.varlen import varlen_attn

        starts = torch.arange(count + 1, dtype=torch.int32, device="cuda") * length
        flat = [part.reshape(count * length, -1, shape.head_dim) for part in (key, value)]
        group = shape.num_heads // shape.num_kv_heads
        flat = [part.repeat_interleave(group, 1) for part in flat]
        runs["varlen_attn"] = lambda: varlen_attn(
            query, *flat, starts, starts, length, length, window_size=(-1, 0)
        )
    except ImportError:
        print("no varlen_attn in this torch")
    for name, run in runs.items():
        try:
            seconds = time_graph(run)
        except Exception as error:
            print("FAILED", name, str(error)[:200])
            continue
        print(f"{seconds * 1e6:9.1f} us {operations / seconds / 1e12:6.1f} TFLOP/s torch {name}")


def attend_by_torch(rows: list[Tensor], backend: SDPBackend) -> Tensor:
    """Fused attention of torch by one of its backends."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="32x32x128,32x8x128", help="heads x kv heads x size")
    parser.add_argument("--rows", default="1,8,32,128", help="sequences of a decode step")
    parser.add_argument("--context", type=int, default=1060, help="tokens of each")
    parser.add_argument("--prompts", default="1x1024,1x4096", help="prompts of a prefill step")
    parser.add_argument("--prefix", type=int, default=0, help="tokens cached before each prompt")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--int8", action="store_true", help="int8 cache")
    parser.add_argument("--tune", action="store_true", help="try many tiles")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    shapes = [
        Shape(*map(int, text.split("x")), args.int8, args.block_size)
        for text in args.shapes.split(",")
    ]
    rows = [int(text) for text in args.rows.split(",") if text]
    prompts = [tuple(map(int, text.split("x"))) for text in args.prompts.split(",") if text]
    jobs = []
    for shape in shapes:
        if rows:
            jobs += [(shape, tiles) for tiles in list_decode_tiles(shape, args.tune)]
        if prompts:
            jobs += [(shape, tiles) for tiles in list_prefill_tiles(shape, args.tune)]
    print(f"{len(jobs)} variants", flush=True)
    for message in compile_in_parallel(launch_once, jobs, TARGET, os.cpu_count() or 1):
        print("does not compile:", message)
    copy_rate = measure_copy_rate()
    print(f"{torch.cuda.get_device_name()}: copy rate {copy_rate / 1e12:.2f} TB/s", flush=True)
    for shape in shapes:
        if rows:
            variants = list_decode_tiles(shape, args.tune)
            measure_decode(shape, variants, rows, args.context, copy_rate)
        if prompts:
            measure_prefill(shape, list_prefill_tiles(shape, args.tune), prompts, args.prefix)


if __name__ == "__main__":
    main()

"""Products on one CUDA card: checked against float64, then timed beside the card's copy rate.

    python -m benchmarks.gpu_products                      # everything
    python -m benchmarks.gpu_products --only check,few     # some sections

Each section stands alone, and one that fails does not keep the others from running. Times are
medians of graph replays over weights that together are far larger than the card's cache.
"""

# ruff: noqa: B023  (what is timed is called before the loop goes on)

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional

from autotp_serving.kernels.cuda.activations import (
    Activations,
    HeadsEnd,
    Rotation,
    Rounding,
    quantize_tokens,
    rotate_and_store,
    silu_multiply,
)
from autotp_serving.kernels.cuda.batch_products import (
    BatchTiling,
    count_shared_bytes,
    multiply_batch,
)
from autotp_serving.kernels.cuda.batch_products import make_defines as make_batch_defines
from autotp_serving.kernels.cuda.norms import add_rms_norm
from autotp_serving.kernels.cuda.nvrtc import compile_source, name_architecture
from autotp_serving.kernels.cuda.ops import low_bit_linear, register_ops
from autotp_serving.kernels.cuda.products import (
    Tiling,
    choose_tiling,
    make_defines,
    multiply,
    multiply_few,
    multiply_many,
    rounding_of,
)
from autotp_serving.kernels.cuda.tiles import CudaTensor, tile
from autotp_serving.kernels.cuda.wide_products import TILINGS as WIDE_TILINGS
from autotp_serving.kernels.cuda.wide_products import WideTiling, multiply_wide
from autotp_serving.kernels.cuda.wide_products import make_defines as make_wide_defines
from autotp_serving.low_bit.formats import FORMATS
from autotp_serving.low_bit.tensor import LowBitTensor, dequantize, quantize

SHAPES = {
    "qkv": (12288, 4096),
    "out": (4096, 4096),
    "gate-up": (22016, 4096),
    "down": (4096, 11008),
}
CACHE_BYTES = 2**28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 16, 32, 64], help="to tune")
    parser.add_argument("--only", default="", help="sections, separated by commas; all: nothing")
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    rate = copy_rate()
    print(f"copy rate {rate / 1e12:.2f} TB/s", flush=True)
    sections = {
        "check": check_formats,
        "activations": check_activations,
        "operator": check_operator,
        "tune": lambda: tune(rate, options.tokens),
        "batch": lambda: tune_batch(rate),
        "wide": tune_wide,
        "few": lambda: time_few(rate),
        "many": time_many,
        "layers": lambda: time_layers(rate),
    }
    for name, run in sections.items():
        if wanted and name not in wanted:
            continue
        started = time.perf_counter()
        print(f"--- {name}", flush=True)
        try:
            with torch.inference_mode():
                run()
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()
        print(f"--- {name}: {time.perf_counter() - started:.1f} s", flush=True)


def copy_rate() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / min(times)


def time_calls(calls: list[Callable[[], object]], repeats: int = 7) -> float:
    """Median seconds of one call, of graph replays that run all of them in turn."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def random_weight(name: str, rows: int, columns: int) -> LowBitTensor:
    return quantize(torch.randn(rows, columns, device="cuda") * 0.02, FORMATS[name])


def round_activations(x: Tensor) -> Tensor:
    """What 8-bit codes with a scale per 64 stand for, in float64."""
    blocks = x.float().view(len(x), -1, 64)
    peak = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * (127.0 / peak)).round().nan_to_num(0.0)
    return (codes.double() * (peak / 127.0).double()).view(len(x), -1)


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference).norm() / reference.norm())


def compile_ahead(variants: Iterable[tuple[str | None, Tiling]]) -> None:
    """Fill the cache of compiled kernels, many at a time."""
    jobs = {make_defines(name and FORMATS[name], tiling) for name, tiling in variants}
    started = time.perf_counter()
    compile_all("products.cu", jobs)
    print(f"{len(jobs)} variants compiled in {time.perf_counter() - started:.1f} s", flush=True)


def compile_all(source: str, jobs: Iterable[tuple[tuple[str, str], ...]]) -> None:
    """The same of any source, by what its macros stand for."""
    architecture = name_architecture(torch.cuda.current_device())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: compile_source(source, dict(job), architecture), jobs))


def check_formats() -> None:
    """Every format, at several numbers of tokens, and one token alone as among others."""
    compile_ahead(
        (name, choose_tiling(tokens, 1056, name))
        for name in [*FORMATS, None]
        for tokens in (1, 16, 32, 64)
    )
    for name, (rows, columns) in itertools.product([*FORMATS, "bf16"], [(1056, 1408), (200, 512)]):
        x = torch.randn(100, columns, device="cuda", dtype=torch.bfloat16)
        x[3] = 0
        x[5, 64:128] *= 1e-3
        if name == "bf16":
            if rows % 16:
                continue
            weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
            reference = x.double() @ weight.double().t()
            results = {
                tokens: multiply_few(Activations(tokens, columns, x[:tokens]), weight)
                for tokens in (1, 2, 3, 8, 9, 17, 33, 64)
            }
        else:
            canonical = random_weight(name, rows, columns)
            weight = tile(canonical)
            same = weight.canonical().planes
            assert all(torch.equal(same[key], canonical.planes[key]) for key in same), name
            dense = dequantize(canonical, torch.float32).double()
            integers = rounding_of(weight.format, 1) is Rounding.INTEGERS
            reference = (round_activations(x) if integers else x.double()) @ dense.t()
            results = {
                tokens: multiply(x[:tokens], weight) for tokens in (1, 2, 3, 8, 9, 17, 33, 64, 100)
            }
        errors = {
            tokens: relative_error(out, reference[:tokens]) for tokens, out in results.items()
        }
        alone = results[1][0]
        few = [tokens for tokens in results if tokens <= 16]
        invariant = all(torch.equal(results[tokens][0], alone) for tokens in few)
        largest = results[9]
        invariant &= all(torch.equal(results[t], largest[:t]) for t in few)
        worst = max(errors.values())
        verdict = "ok" if worst < (8e-3 if name == "nf4" else 5e-3) and invariant else "WRONG"
        print(
            f"{name:9} {rows}x{columns} {verdict} worst error {worst:.1e} "
            f"(at {errors[1]:.1e} for 1, {list(errors.values())[-1]:.1e} for the most), "
            f"alone as among others: {invariant}",
            flush=True,
        )


def check_operator() -> None:
    """The operator that torch.compile sees: the same numbers, and no graph break."""
    weight = tile(random_weight("sym_int4", 512, 256))
    x = torch.randn(5, 256, device="cuda", dtype=torch.bfloat16)
    register_ops()
    compiled = torch.compile(lambda x: low_bit_linear(x * 2, weight) + 1, fullgraph=True)
    print("compiled as launched:", torch.equal(compiled(x), multiply(x * 2, weight) + 1))


def check_activations() -> None:
    """Norm, gated activation, rotation and rounding against torch's own operations."""
    x = torch.randn(9, 4096, device="cuda", dtype=torch.bfloat16)
    added = torch.randn_like(x)
    weight = torch.rand(4096, device="cuda", dtype=torch.bfloat16)

    def norm(hidden: Tensor) -> Tensor:
        values = hidden.float()
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-5)
        return weight * values.bfloat16()

    hidden = x.clone()
    out = add_rms_norm(hidden, added, weight, 1e-5, Rounding.NONE).plain
    expected = norm(x + added)
    print(
        "norm: sum equal",
        torch.equal(hidden, x + added),
        "off by",
        relative_error(out, expected.double()),
        "unequal",
        int((out != expected).sum()),
    )
    out = add_rms_norm(x.clone(), added, weight, 1e-5, Rounding.VALUES).plain
    print("norm, rounded values", relative_error(out, round_activations(expected)))
    for columns in (11008, 1408, 4096):
        gate_up = torch.randn(9, 2 * columns, device="cuda", dtype=torch.bfloat16)
        gate, up = gate_up.chunk(2, -1)
        expected = functional.silu(gate) * up
        out = silu_multiply(gate_up, None, Rounding.NONE).plain
        print(
            "silu",
            columns,
            relative_error(out, expected.double()),
            "unequal",
            int((out != expected).sum()),
        )
        # Through a product with ones on its diagonal, codes come back as numbers.
        made = silu_multiply(gate_up, None, Rounding.INTEGERS)
        ones = tile(quantize(torch.eye(columns, device="cuda"), FORMATS["sym_int8"]))
        back = multiply_few(made, ones)
        print("silu, integers", relative_error(back, round_activations(expected)))
        back = multiply_few(quantize_tokens(gate.contiguous(), Rounding.INTEGERS), ones)
        print("rounding", relative_error(back, round_activations(gate)))
    for head_dim, norms in ((128, False), (64, True), (96, False)):
        heads, kv_heads, longest = 8, 4, 300
        angle = torch.rand(longest, head_dim // 2, device="cuda").repeat(1, 2)
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        qkv = torch.randn(9, 16 * head_dim, device="cuda", dtype=torch.bfloat16)
        bias = torch.randn(16 * head_dim, device="cuda", dtype=torch.bfloat16)
        head_norm = torch.rand(head_dim, device="cuda", dtype=torch.bfloat16) if norms else None
        positions = torch.randint(0, longest, (9,), device="cuda")
        slots = torch.randperm(64, device="cuda")[:9]
        slots[4] = -1
        pools = tuple(
            torch.zeros(64, kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
            for _ in range(2)
        )
        parts = (qkv + bias).view(9, 16, head_dim)
        query, key, value = parts.split((heads, kv_heads, kv_heads), 1)
        if norms:

            def head_rms(v: Tensor, w: Tensor = head_norm) -> Tensor:
                values = v.float()
                factor = torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6)
                return w * (values * factor).bfloat16()

            query, key = head_rms(query), head_rms(key)

        def rotate(v: Tensor) -> Tensor:
            low, high = v.chunk(2, -1)
            turned = torch.cat([-high, low], -1)
            return v * cos[positions][:, None] + turned * sin[positions][:, None]

        expected = torch.cat([rotate(query), rotate(key), value], 1)
        rotation = Rotation(cos, sin, head_norm, head_norm, 1e-6, bias)
        rotate_and_store(qkv, HeadsEnd(rotation, positions, heads, kv_heads, slots, pools))
        got = qkv.view(9, 16, head_dim).clone()
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                got[row, heads : heads + kv_heads] = pools[0][slot]
                got[row, heads + kv_heads :] = pools[1][slot]
        print(
            "rotation",
            head_dim,
            relative_error(got, expected.double()),
            "unequal",
            int((got != expected).sum()),
            "only there",
            int((pools[0] != 0).any(-1).any(-1).sum()) == 8,
        )


def make_weights(name: str | None, rows: int, columns: int) -> list[CudaTensor | Tensor]:
    """As many as overflow the card's cache; bfloat16 for None."""
    if name is None:
        count = max(2, -(-CACHE_BYTES // (rows * columns * 2)))
        return [
            torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(count)
        ]
    one = tile(random_weight(name, rows, columns))
    count = max(2, -(-CACHE_BYTES // one.num_bytes))
    copies = [
        CudaTensor(one.format, one.shape, {k: v.clone() for k, v in one.planes.items()})
        for _ in range(count - 1)
    ]
    return [one, *copies]


def make_activations(name: str | None, num_tokens: int, columns: int) -> Activations:
    x = torch.randn(num_tokens, columns, device="cuda", dtype=torch.bfloat16)
    return quantize_tokens(x, rounding_of(name and FORMATS[name], num_tokens))


def weight_bytes(weight: CudaTensor | Tensor) -> int:
    return weight.nbytes if isinstance(weight, Tensor) else weight.num_bytes


def tune(rate: float, token_counts: list[int]) -> None:
    """Which tiling is the fastest, by format, shape and number of tokens."""
    space = {
        1: [Tiling(w, 1, r, d) for w in (4, 8, 16) for r in (1, 2, 4) for d in (1, 2)],
        2: [Tiling(w, 2, r, d) for w in (8, 16) for r in (1, 2) for d in (1, 2)],
        4: [Tiling(w, 4, r, d) for w in (4, 8, 16) for r in (1, 2, 4) for d in (1, 2)],
        8: [Tiling(w, 8, r, d) for w in (4, 8, 16) for r in (1, 2) for d in (1, 2)],
    }
    space = {n: [t for t in tilings if t.warps * t.row_tiles <= 32] for n, tilings in space.items()}
    names = ("sym_int4", None, "fp8_e4m3", "sym_int8", "nf4")
    compile_ahead(
        (name, tiling) for name in names for tilings in space.values() for tiling in tilings
    )
    table = {}
    for name in names:
        for shape, (rows, columns) in SHAPES.items():
            weights = make_weights(name, rows, columns)
            for tokens in token_counts:
                x = make_activations(name, tokens, columns)
                tiles = next(n for n in (1, 2, 4, 8) if n * 8 >= tokens)
                times = {}
                for tiling in space[tiles]:
                    calls = [(lambda w=w, t=tiling: multiply_few(x, w, t)) for w in weights]
                    try:
                        times[tiling] = time_calls(calls, repeats=5)
                    except RuntimeError as error:
                        print(tiling, error)
                best = sorted(times, key=times.get)[:4]
                floor = weight_bytes(weights[0]) / rate
                shown = ", ".join(
                    f"w{t.warps} r{t.row_tiles} d{t.depth}: {times[t] * 1e6:.1f} "
                    f"({floor / times[t]:.0%})"
                    for t in best
                )
                if name is None:
                    plain = x.plain
                    seconds = time_calls(
                        [(lambda w=w: functional.linear(plain, w)) for w in weights], repeats=5
                    )
                    shown += f"; cuBLAS {seconds * 1e6:.1f} ({floor / seconds:.0%})"
                print(f"{name or 'bf16':9} {shape:8} {tokens:3}: {shown}", flush=True)
                table[f"{name or 'bf16'} {shape} {tokens}"] = {
                    f"w{t.warps}r{t.row_tiles}d{t.depth}": round(times[t] * 1e6, 2) for t in times
                }
            del weights
            torch.cuda.empty_cache()
    if "OUT" in os.environ:
        with open(os.path.join(os.environ["OUT"], "tune.json"), "w") as file:
            json.dump(table, file)


def tune_batch(rate: float) -> None:
    """Which tiling of csrc/batch_products.cu is the fastest, beside the other ways to multiply."""
    space = [
        BatchTiling(*t)
        for t in itertools.product((4, 8, 16), (1, 2, 4, 8), (4, 6), (1, 2), (2, 3))
        if t[0] < 16 or t[4] < 3
    ]
    names = ("sym_int4", "fp8_e4m3")
    space = [
        t
        for t in space
        if all(count_shared_bytes(FORMATS[n], t) * t.thread_blocks <= 226 * 2**10 for n in names)
    ]
    compile_all("batch_products.cu", [make_batch_defines(n, t) for n in names for t in space])
    for name in names:
        rounding = rounding_of(FORMATS[name], 1)
        sums: Counter[tuple[int, str]] = Counter()
        for shape, (rows, columns) in SHAPES.items():
            weights = make_weights(name, rows, columns)
            floor = weight_bytes(weights[0]) / rate
            dense = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(2)]
            for tokens in (32, 64, 128, 256, 512):
                plain = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
                x = quantize_tokens(plain, rounding)
                expected = multiply_few(x, weights[0]).double()
                times = {}
                for tiling in space:
                    if tiling.token_tiles > 4 and tiling.token_tiles * 4 >= tokens:
                        continue
                    off = relative_error(multiply_batch(x, weights[0], tiling), expected)
                    if not off < 3e-3:
                        print(name, shape, tokens, tiling, "WRONG", off)
                    calls = [(lambda w=w, t=tiling: multiply_batch(x, w, t)) for w in weights]
                    times[tiling] = time_calls(calls, repeats=3)
                best = sorted(times, key=times.get)[:3]
                others = {
                    "chosen": [(lambda w=w: multiply_batch(x, w)) for w in weights],
                    "few": [(lambda w=w: multiply_few(x, w)) for w in weights],
                    "many": [(lambda w=w: multiply_many(plain, w)) for w in weights],
                    "cuBLAS bf16": [(lambda w=w: functional.linear(plain, w)) for w in dense],
                }
                seconds = {key: time_calls(calls, 3) for key, calls in others.items()}
                seconds["best"] = times[best[0]]
                for key, value in seconds.items():
                    sums[tokens, key] += value
                shown = ", ".join(
                    f"t{t.token_tiles} s{t.splits} d{t.stages} p{t.step} b{t.thread_blocks}: "
                    f"{times[t] * 1e6:.1f}"
                    for t in best
                )
                shown += "; " + ", ".join(f"{k} {v * 1e6:.1f}" for k, v in seconds.items())
                print(f"{name} {shape:8} {tokens:3}, bound {floor * 1e6:.1f}: {shown}", flush=True)
            del weights, dense
            torch.cuda.empty_cache()
        print(name, "a layer, us:", {key: round(s * 1e6) for key, s in sums.items()}, flush=True)


def tune_wide() -> None:
    """Which tiling of csrc/wide_products.cu is the fastest, beside cuBLAS in bfloat16."""
    names = ("sym_int4", "fp8_e4m3")
    compile_all("wide_products.cu", [make_wide_defines(n, t) for n in names for t in WIDE_TILINGS])
    for tokens in (128, 256, 1024, 4096):
        sums: Counter[str] = Counter()
        for shape, (rows, columns) in SHAPES.items():
            plain = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            x = quantize_tokens(plain, Rounding.WIDE)
            dense = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(3)]
            sums["bf16"] += time_calls([(lambda w=w: functional.linear(plain, w)) for w in dense])
            del dense
            for name in names:
                weights = make_weights(name, rows, columns)
                expected = plain.double() @ dequantize(weights[0].canonical()).double().t()
                times: dict[WideTiling | None, float] = {}
                for tiling in (None, *WIDE_TILINGS):
                    off = relative_error(multiply_wide(x, weights[0], tiling), expected)
                    if not off < 5e-3:
                        print(name, shape, tokens, tiling, "WRONG", off)
                    calls = [(lambda w=w, t=tiling: multiply_wide(x, w, t)) for w in weights]
                    times[tiling] = time_calls(calls, 3)
                sums[name] += times[None]
                best = sorted(times, key=times.get)[:3]
                shown = ", ".join(f"{t or 'chosen'}: {times[t] * 1e6:.1f}" for t in best)
                print(f"{name} {shape:8} {tokens:4}: {times[None] * 1e6:.1f}; {shown}", flush=True)
                del weights, expected
            torch.cuda.empty_cache()
        ratios = ", ".join(f"{n} {sums['bf16'] / sums[n]:.0%} of bf16's rate" for n in names)
        print(f"{tokens:5} tokens, a layer: bf16 {sums['bf16'] * 1e6:.0f} us; {ratios}", flush=True)


def time_few(rate: float) -> None:
    """Every format as it is used, by number of tokens."""
    counts = (1, 8, 16, 32, 64, 128)
    compile_ahead(
        (name, choose_tiling(min(tokens, 64), rows, name))
        for name in [*FORMATS, None]
        for tokens in counts
        for rows, _ in SHAPES.values()
    )
    for name in [*FORMATS, None]:
        line, sums, floors = [], Counter(), 0.0
        for shape, (rows, columns) in SHAPES.items():
            weights = make_weights(name, rows, columns)
            floor = weight_bytes(weights[0]) / rate
            floors += floor
            for tokens in counts:
                x = make_activations(name, tokens, columns)
                seconds = time_calls([(lambda w=w: multiply_few(x, w)) for w in weights], 5)
                sums[tokens] += seconds
                if tokens == 1:
                    line.append(f"{shape}: {seconds * 1e6:.1f} ({floor / seconds:.0%})")
            del weights
            torch.cuda.empty_cache()
        total = ", ".join(f"{n}: {s * 1e6:.0f}" for n, s in sums.items())
        print(
            f"{name or 'bf16':9} us a layer by tokens: {total}, bound {floors * 1e6:.0f}; "
            f"one token: {'; '.join(line)}",
            flush=True,
        )


def time_many() -> None:
    """Many tokens: bfloat16 by cuBLAS, and formats dequantized a part of the rows at a time."""
    for tokens in (128, 256, 1024, 4096):
        dense_sum, sums = 0.0, {}
        for shape, (rows, columns) in SHAPES.items():
            x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            weights = [
                torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(2)
            ]
            dense = time_calls([(lambda w=w: functional.linear(x, w)) for w in weights])
            dense_sum += dense
            teraflops = 2 * tokens * rows * columns / dense / 1e12
            print(
                f"{tokens:5} {shape:8} bf16 {dense * 1e6:.0f} us, {teraflops:.0f} T/s",
                end="; ",
                flush=True,
            )
            del weights
            for name in ("sym_int4", "fp8_e4m3"):
                weights = make_weights(name, rows, columns)[:2]
                shown = {}
                for chunk in (None, 2048, 4096, 8192):
                    calls = [(lambda w=w, c=chunk: multiply_many(x, w, c)) for w in weights]
                    shown[chunk] = time_calls(calls)
                sums[name] = sums.get(name, 0.0) + shown[None]
                print(name, ", ".join(f"{c}: {s * 1e6:.0f}" for c, s in shown.items()), end="; ")
                del weights
            print(flush=True)
        ratios = ", ".join(f"{name} {dense_sum / s:.0%} of bf16's rate" for name, s in sums.items())
        print(f"{tokens:5} tokens, a layer: bf16 {dense_sum * 1e6:.0f} us; {ratios}", flush=True)


def time_layers(rate: float) -> None:
    """Products, norms and gated activations of 32 layers as one graph, with overlap and without."""
    from autotp_serving.kernels.cuda import nvrtc, products

    def clear_kernels() -> None:
        nvrtc.load_kernel.cache_clear()
        products.load_product.cache_clear()

    for name in ("sym_int4", None):
        layers = []
        for _ in range(32):
            layer = {}
            for shape, (rows, columns) in SHAPES.items():
                if name is None:
                    layer[shape] = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
                else:
                    layer[shape] = tile(random_weight(name, rows, columns))
            layers.append(layer)
        norm = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
        num_bytes = sum(weight_bytes(w) for layer in layers for w in layer.values())
        for tokens, overlaps in itertools.product((1, 8), (False, True)):
            hidden = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
            format = name and FORMATS[name]
            rounding = rounding_of(format, tokens)

            def run() -> None:
                added = None
                for layer in layers:
                    x = add_rms_norm(hidden, added, norm, 1e-5, rounding)
                    qkv = multiply_few(x, layer["qkv"])
                    x = quantize_tokens(qkv[:, :4096], rounding)
                    if x.plain is not None:
                        x = Activations(tokens, 4096, qkv[:, :4096].contiguous())
                    added = multiply_few(x, layer["out"])
                    x = add_rms_norm(hidden, added, norm, 1e-5, rounding)
                    x = silu_multiply(multiply_few(x, layer["gate-up"]), None, rounding)
                    added = multiply_few(x, layer["down"])

            original = nvrtc.OVERLAP_CAPABILITY
            if not overlaps:
                nvrtc.OVERLAP_CAPABILITY = (99, 0)
            clear_kernels()
            try:
                seconds = time_calls([run])
            finally:
                nvrtc.OVERLAP_CAPABILITY = original
                clear_kernels()
            print(
                f"{name or 'bf16'} 32 layers without attention, {tokens} tokens, overlap "
                f"{overlaps}: {seconds * 1e3:.3f} ms ({num_bytes / rate / seconds:.0%})",
                flush=True,
            )
        layers.clear()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

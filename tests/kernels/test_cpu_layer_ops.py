"""What a layer does between its matrices: the compiled operations beside torch, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from autotp_serving.devices.build import ISAS, BuildError, processor_flags
from autotp_serving.kernels.cpu import layer_ops
from autotp_serving.kernels.cpu.adapters import AdapterRuns, CpuAdapters, SlotMemory
from autotp_serving.kernels.cpu.layer_ops import LayerOps, load_layer_ops
from autotp_serving.kernels.kv_pools import quantize
from tests.compiler import can_compile
from tests.kernels.test_cpu_attention import make_pools

ONE_STEP = 2.0**-8  # of bfloat16, relative


@pytest.fixture(params=["avx512", "avx2"])
def ops(request: pytest.FixtureRequest) -> LayerOps:
    if not ISAS[request.param].needs <= processor_flags():
        pytest.skip(f"no {request.param} here")
    if not can_compile():
        pytest.skip("no C++ compiler")
    ops = load_layer_ops(request.param)
    assert ops is not None, "it does not compile: see the log"
    return ops


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def norm_exactly(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    x = x.double()
    return weight.double() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def assert_near(ours: Tensor, exact: Tensor, steps: float) -> None:
    """Off by no more than some steps of bfloat16."""
    assert ours.dtype == torch.bfloat16
    assert bool(((ours.double() - exact).abs() <= steps * ONE_STEP * exact.abs() + 1e-6).all())


@pytest.mark.parametrize("shape", [(1, 16), (3, 2048), (70, 2048)])
def test_rms_norm(ops: LayerOps, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, added = torch.randn(2, *shape).bfloat16()
    weight = torch.randn(shape[1]).bfloat16()
    before = x.clone()
    assert_near(ops.rms_norm(x, None, weight, 1e-5), norm_exactly(x, weight, 1e-5), 2.02)
    assert torch.equal(x, before)
    out = ops.rms_norm(x, added, weight, 1e-5)
    assert torch.equal(x, before + added)
    assert_near(out, norm_exactly(x, weight, 1e-5), 2.02)


def test_rms_norm_of_extremes(ops: LayerOps) -> None:
    weight = torch.ones(32).bfloat16()
    zeros = ops.rms_norm(torch.zeros(1, 32).bfloat16(), None, weight, 1e-6)
    assert torch.equal(zeros, torch.zeros_like(zeros))
    huge = torch.full((1, 32), 1e15).bfloat16()
    assert torch.equal(ops.rms_norm(huge, None, weight, 1e-6), torch.ones(1, 32).bfloat16())
    spoilt = torch.randn(2, 32).bfloat16()
    spoilt[1, 3] = float("nan")
    out = ops.rms_norm(spoilt, None, weight, 1e-6)
    assert out[1].isnan().all() and out[0].isfinite().all()


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 1, 32), (90, 8, 2, 64), (5, 3, 3, 96)])
def test_rotate_and_store(
    ops: LayerOps, shape: tuple[int, int, int, int], has_norms: bool, is_int8: bool
) -> None:
    torch.manual_seed(0)
    tokens, heads, kv_heads, size = shape
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * size).bfloat16()
    angles = torch.randn(tokens, size // 2).repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    slots = torch.randperm(tokens + 7)[:tokens]
    num_slots = -(-(tokens + 7) // 16) * 16
    pools = make_pools(num_slots, kv_heads, (size, size), is_int8)
    norms = None
    if has_norms:
        norms = (*torch.randn(2, size).bfloat16(), 1e-6)
    query, key, value = qkv.clone().view(tokens, -1, size).split([heads, kv_heads, kv_heads], 1)
    ops.rotate_and_store(qkv, (cos, sin), slots, pools, norms)
    keys = pools.keys.permute(0, 3, 1, 2, 4).reshape(num_slots, kv_heads, size)
    values = pools.values.permute(0, 2, 4, 1, 3).reshape(num_slots, kv_heads, size)

    def rotate(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = norm_exactly(x, weight, 1e-6).bfloat16()
        low, high = x.double().chunk(2, -1)
        return x.double() * cos[:, None].double() + torch.cat([-high, low], -1) * sin[:, None]

    # A sum of two products may cancel: the bound is one step of the larger of them.
    bound = 2.5 * ONE_STEP * (4.0 if not has_norms else 12.0)
    ours = qkv.view(tokens, -1, size)[:, :heads].double()
    assert (ours - rotate(query, norms and norms[0])).abs().max() < bound
    rotated_key = rotate(key, norms and norms[1])
    if is_int8:
        # Rounding once more: by half of a 127th of the largest number of a head.
        key_scales = pools.key_scales.transpose(1, 2).reshape(num_slots, kv_heads)[slots]
        codes, scales = quantize(value)
        assert torch.equal(values[slots], codes)
        value_scales = pools.value_scales.transpose(1, 2).reshape(num_slots, kv_heads)[slots]
        assert torch.equal(value_scales, scales)
        read = keys[slots].double() * key_scales[..., None]
        assert ((read - rotated_key).abs().amax(-1) < bound + 0.51 * key_scales).all()
    else:
        assert (keys[slots].double() - rotated_key).abs().max() < bound
        assert torch.equal(values[slots], value)
    unused = torch.ones(num_slots, dtype=torch.bool)
    unused[slots] = False
    assert bool((keys[unused] == 9).all() and (values[unused] == 9).all())


@pytest.mark.parametrize("shape", [(1, 16), (3, 704), (80, 1408)])
def test_silu_multiply(ops: LayerOps, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(shape[0], 2 * shape[1]) * 4).bfloat16()
    gate, up = gate_up.double().chunk(2, 1)
    assert_near(ops.silu_multiply(gate_up), torch.nn.functional.silu(gate) * up, 2.02)


def test_silu_multiply_of_extremes(ops: LayerOps) -> None:
    gate = torch.tensor([0.0, -0.0, 300.0, -300.0, 1e30, -1e30, float("nan"), 1.0] * 2)
    gate_up = torch.cat([gate, torch.full((16,), 2.0)])[None].bfloat16()
    out = ops.silu_multiply(gate_up)[0, :8].float()
    expected = 2 * torch.nn.functional.silu(gate[:8].bfloat16().float())
    torch.testing.assert_close(out, expected.bfloat16().float(), equal_nan=True)


@pytest.mark.parametrize(
    ("cols", "widths", "ranks"),
    [(48, (32, 16), (5, 8)), (2048, (64,), (16, 1)), (80, (16, 16, 48), (3, 7))],
)
def test_adapters_add_their_products(
    ops: LayerOps, cols: int, widths: tuple[int, ...], ranks: tuple[int, int]
) -> None:
    """Odd ranks, columns that are no whole vectors, runs of one token and of several."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).bfloat16()

    adapters = CpuAdapters(ops, cols, widths, SlotMemory(2), 16)
    x, out = draw(9, cols), draw(9, sum(widths))
    spans = [(0, 1, 1), (1, 7, 2), (8, 9, 1)]
    expected = out.double()
    for slot, rank in enumerate(ranks, start=1):
        for part, rows in enumerate(expected.split(widths, dim=1)):
            down, up = draw(rank, cols), draw(widths[part], rank)
            adapters.put(slot, part, down, up, 0.5)
            for start, stop, of_slot in spans:
                if of_slot == slot:
                    low_rank = x[start:stop].double() @ down.double().T
                    rows[start:stop] += 0.5 * low_rank @ up.double().T
    adapters.add(x, out, AdapterRuns(spans, 3 * 16))
    torch.testing.assert_close(out.double(), expected, rtol=ONE_STEP, atol=1e-3)


def test_no_compiler_means_no_operations(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise BuildError("no C++ compiler (g++)")

    monkeypatch.setattr(layer_ops, "build_library", fail)
    load_layer_ops.cache_clear()
    try:
        assert load_layer_ops() is None
    finally:
        load_layer_ops.cache_clear()
    assert "no C++ compiler" in caplog.text

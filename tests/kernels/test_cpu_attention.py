"""The CPU's paged attention beside plain attention in float64 and the portable path."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from autotp_serving.devices.build import ISAS, BuildError, processor_flags
from autotp_serving.kernels.cpu import attention
from autotp_serving.kernels.cpu.attention import (
    CpuAttention,
    CpuCache,
    can_attend,
    load_library,
    pool_shapes,
    store,
)
from autotp_serving.kernels.kv_pools import Pools, quantize
from autotp_serving.kernels.reference.attention import ReferenceCache
from autotp_serving.model.attention import AttentionContext, paged_attention
from autotp_serving.model.kv_cache import KVCache, KVCacheShape
from tests.compiler import can_compile, needs_compiler
from tests.model.steps import make_inputs

NUM_BLOCKS = 200
MIXED = ((1, 1), (1, 64), (1, 65), (5, 5), (37, 300), (1, 500), (130, 130), (64, 128))


@pytest.fixture(params=["avx512", "avx2"])
def isa(request: pytest.FixtureRequest) -> str:
    if not ISAS[request.param].needs <= processor_flags():
        pytest.skip(f"no {request.param} here")
    if not can_compile():
        pytest.skip("no C++ compiler")
    assert load_library(request.param) is not None, "it does not compile: see the log"
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Some tests change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pack(keys: Tensor, values: Tensor, is_int8: bool = False) -> Pools:
    """Pools [slot, head, size] in the kernel's order, by torch."""
    slots, heads, key_dim = keys.shape
    scales = []
    if is_int8:
        (keys, key_scales), (values, value_scales) = quantize(keys), quantize(values)
        scales = [
            scale.view(slots // 16, 16, heads).transpose(1, 2).contiguous()
            for scale in (key_scales, value_scales)
        ]
    keys = keys.view(slots // 16, 16, heads, key_dim // 2, 2).permute(0, 2, 3, 1, 4)
    values = values.view(slots // 16, 8, 2, heads, -1).permute(0, 3, 1, 4, 2)
    return Pools(keys.contiguous(), values.contiguous(), *scales)


def make_pools(num_slots: int, heads: int, dims: tuple[int, int], is_int8: bool) -> Pools:
    """Pools in the kernel's order, of nines."""
    shapes, scale_shape = pool_shapes(num_slots, heads, *dims)
    dtype = torch.int8 if is_int8 else torch.bfloat16
    scales = [torch.full(scale_shape, 9.0) for _ in shapes] if is_int8 else []
    return Pools(*(torch.full(shape, 9, dtype=dtype) for shape in shapes), *scales)


@dataclass(frozen=True)
class Case:
    """A pool of keys and values [slot, head, size], and sequences that run their last tokens."""

    keys: Tensor
    values: Tensor
    query: Tensor
    spans: tuple[tuple[int, int], ...]
    tables: list[list[int]]
    block_size: int
    is_int8: bool = False

    def attend(
        self, indices: list[int] | None = None, isa: str | None = None, **options: object
    ) -> list[Tensor]:
        """Outputs per sequence, of those in `indices` (default: all) as one batch."""
        indices = list(range(len(self.spans))) if indices is None else indices
        queries = self.query.split([length for length, _ in self.spans])
        lens = [self.spans[i][0] for i in indices]
        starts = [self.spans[i][1] - self.spans[i][0] for i in indices]
        inputs = make_inputs([self.tables[i] for i in indices], starts, lens, self.block_size)
        attend = CpuAttention(inputs, self.block_size, isa=isa)
        out = attend.attend(
            torch.cat([queries[i] for i in indices]),
            None,
            pack(self.keys, self.values, self.is_int8),
            self.query.shape[2] ** -0.5,
            **options,
        )
        return list(out.split(lens))

    def slots(self, index: int) -> Tensor:
        """Of a sequence's context."""
        blocks = torch.tensor(self.tables[index])
        slots = (blocks[:, None] * self.block_size + torch.arange(self.block_size)).flatten()
        return slots[: self.spans[index][1]]

    def exact(
        self, index: int, window: int | None, softcap: float | None, sinks: Tensor | None = None
    ) -> Tensor:
        """What a sequence's output should be, in float64."""
        query = self.query.split([length for length, _ in self.spans])[index].double()
        group = query.shape[1] // self.keys.shape[1]
        rows = [pool[self.slots(index)] for pool in (self.keys, self.values)]
        if self.is_int8:
            rows = [codes.double() * scales[..., None] for codes, scales in map(quantize, rows)]
        keys, values = (numbers.double().repeat_interleave(group, 1) for numbers in rows)
        logits = torch.einsum("thd,shd->hts", query, keys) * query.shape[2] ** -0.5
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        length, context = self.spans[index]
        position = torch.arange(context - length, context)[:, None]
        visible = torch.arange(context) <= position
        if window is not None:
            visible &= torch.arange(context) > position - window
        logits = logits.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            sink = sinks.double()[:, None, None].expand(*logits.shape[:2], 1)
            logits = torch.cat((logits, sink), -1)
        weights = logits.softmax(-1)[..., :context]
        return torch.einsum("hts,shd->thd", weights, values)


def make_case(
    heads: tuple[int, int] = (8, 2),
    dims: tuple[int, int] = (64, 64),
    spans: tuple[tuple[int, int], ...] = MIXED,
    block_size: int = 16,
    is_int8: bool = False,
) -> Case:
    """Blocks in random order; what no context covers is NaN and must not be read into it."""
    torch.manual_seed(0)
    num_slots = NUM_BLOCKS * block_size
    keys = torch.randn(num_slots, heads[1], dims[0]).bfloat16()
    values = torch.randn(num_slots, heads[1], dims[1]).bfloat16()
    blocks = random.Random(0).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tables = [[blocks.pop() for _ in range(-(-context // block_size))] for _, context in spans]
    query = torch.randn(sum(length for length, _ in spans), heads[0], dims[0]).bfloat16()
    case = Case(keys, values, query, spans, tables, block_size, is_int8)
    unused = torch.ones(num_slots, dtype=torch.bool)
    for index in range(len(spans)):
        unused[case.slots(index)] = False
    keys[unused] = values[unused] = float("nan")
    return case


@pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
@pytest.mark.parametrize("window", [None, 1, 17, 64, 200])
@pytest.mark.parametrize("is_int8", [False, True])
def test_equals_plain_attention(
    isa: str, is_int8: bool, window: int | None, softcap: float | None
) -> None:
    """With int8, that over the keys and values as they were rounded."""
    case = make_case(is_int8=is_int8)
    outs = case.attend(sliding_window=window, softcap=softcap, isa=isa)
    for index, out in enumerate(outs):
        exact = case.exact(index, window, softcap)
        # Weights and output are rounded to 8 bits; the values' magnitudes are below 5.
        assert (out.double() - exact).abs().max() < 0.02
        assert (out.double() - exact).norm() < 0.004 * exact.norm()


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("is_int8", [False, True])
def test_sinks_take_their_share(isa: str, is_int8: bool, window: int | None) -> None:
    case = make_case(is_int8=is_int8)
    sinks = torch.tensor([-100.0, -3.0, 0.0, 1.0, 2.0, 5.0, 10.0, 60.0])
    outs = case.attend(sliding_window=window, sinks=sinks, isa=isa)
    for index, out in enumerate(outs):
        exact = case.exact(index, window, None, sinks)
        assert (out.double() - exact).abs().max() < 0.02
        assert (out.double() - exact).norm() < 0.004 * exact.norm()
        assert (out[:, 7] == 0).all() or out[:, 7].abs().max() < 1e-6  # all goes to the sink


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (7, 1), (32, 4)])
@pytest.mark.parametrize("dims", [(32, 16), (64, 64), (96, 80), (128, 128), (256, 256)])
@pytest.mark.parametrize("is_int8", [False, True])
def test_any_heads_and_sizes(
    isa: str, is_int8: bool, heads: tuple[int, int], dims: tuple[int, int]
) -> None:
    case = make_case(heads, dims, ((1, 70), (9, 20), (3, 130)), block_size=32, is_int8=is_int8)
    for index, out in enumerate(case.attend(isa=isa)):
        exact = case.exact(index, None, None)
        assert (out.double() - exact).norm() < 0.004 * exact.norm()


@pytest.mark.parametrize("is_int8", [False, True])
def test_a_token_is_bitwise_the_same_in_any_company(isa: str, is_int8: bool) -> None:
    """With any number of threads, in any batch, at any place in it."""
    case = make_case(is_int8=is_int8)
    torch.set_num_threads(1)
    alone = [case.attend([index], isa=isa)[0] for index in range(len(MIXED))]
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        for indices in ([0, 1, 2, 3, 4, 5, 6, 7], [6, 2], [7, 4, 4, 0]):
            for index, out in zip(indices, case.attend(indices, isa=isa), strict=True):
                assert torch.equal(out, alone[index])


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("window", [None, 50])
def test_chunks_do_not_show(isa: str, is_int8: bool, window: int | None) -> None:
    """A prompt of 300 at once and in pieces, down to single tokens: bitwise the same."""
    whole = make_case(spans=((300, 300),), is_int8=is_int8)
    expected = whole.attend(sliding_window=window, isa=isa)[0]
    done = 0
    for length in (1, 63, 64, 1, 100, 7, 64):
        rows = slice(done, done + length)
        done += length
        part = replace(whole, query=whole.query[rows], spans=((length, done),))
        assert torch.equal(part.attend(sliding_window=window, isa=isa)[0], expected[rows])


def test_queries_as_they_lie(isa: str) -> None:
    case = make_case(spans=((5, 40),))
    expected = case.attend(isa=isa)[0]
    # As transformers hands them over: heads first in shape, tokens first in memory, or both.
    heads_first = case.query.transpose(0, 1).contiguous().transpose(0, 1)
    strided = replace(case, query=heads_first)
    assert torch.equal(strided.attend(isa=isa)[0], expected)


@pytest.mark.parametrize("is_int8", [False, True])
def test_extreme_logits(isa: str, is_int8: bool) -> None:
    """One position takes it all, or all are equal."""
    case = make_case(spans=((1, 100), (3, 90)), is_int8=is_int8)
    for factor in (0.0, 1e-3, 1e4):
        scaled = replace(case, query=case.query * factor)
        for index, out in enumerate(scaled.attend(isa=isa)):
            assert (out.double() - scaled.exact(index, None, None)).abs().max() < 0.02


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("name", ["keys", "values"])
def test_nan_shows_in_its_own_sequence_alone(isa: str, is_int8: bool, name: str) -> None:
    case = make_case(spans=((1, 100), (3, 90), (1, 70)), is_int8=is_int8)
    clean = case.attend(isa=isa)
    getattr(case, name)[case.slots(1)[10]] = float("nan")
    outs = case.attend(isa=isa)
    assert outs[1].isnan().all()
    assert torch.equal(outs[0], clean[0]) and torch.equal(outs[2], clean[2])


@pytest.mark.parametrize("is_kernel", [True, False])
@pytest.mark.parametrize(
    ("kind", "bound"),
    [("random", 0.03), ("key outliers", 0.08), ("value outliers", 0.02), ("sink", 0.03)],
)
def test_int8_stays_near_the_attention_that_nobody_rounded(
    kind: str, bound: float, is_kernel: bool
) -> None:
    """Relative to the norm of float64's output, on what is hard for one scale a token and head.

    Channels of keys are 30 times as large as the others, as real models have them, and the query
    does not cancel them out; a sink takes nearly all weight and has values near zero, so that the
    output is what a thousand small weights make of the others.
    """
    if is_kernel and not can_compile():
        pytest.skip("no C++ compiler")
    torch.manual_seed(1)
    context, heads, kv_heads, size = 1000, 8, 2, 64
    query = torch.randn(1, heads, size)
    key, value = torch.randn(2, context, kv_heads, size)
    if kind == "key outliers":
        key[..., ::16] = key[..., ::16].sign() * 0.1 + 30  # the same for all positions, nearly
    elif kind == "value outliers":
        value[..., ::16] *= 30
    elif kind == "sink":
        key[0] = query[0].view(kv_heads, heads // kv_heads, size).mean(1) * 4
        value[0] *= 1e-3
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    shape = KVCacheShape(((kv_heads, size, size),), 16, torch.bfloat16, is_int8=True)
    kernels = CpuCache() if is_kernel else ReferenceCache()
    cache = KVCache(shape, 63, torch.device("cpu"), kernels)
    cache.write(0, torch.arange(context), key, value)
    inputs = make_inputs([list(range(63))], [999], [1])
    out, _ = paged_attention(
        SimpleNamespace(layer_idx=0),
        *(rows.transpose(0, 1)[None] for rows in (query, key[999:], value[999:])),
        None,
        attention_context=AttentionContext.of(inputs, cache),
    )
    case = Case(key, value, query, ((1, context),), [list(range(63))], 16)
    exact = case.exact(0, None, None)
    error = (out[0].double() - exact).norm() / exact.norm()
    print(f"{kind}: {error:.4f}")
    assert error < bound


@needs_compiler
@pytest.mark.parametrize("is_int8", [False, True])
def test_equals_the_portable_path(is_int8: bool) -> None:
    """One step's batch through both."""
    torch.manual_seed(0)
    lens, contexts, tables = [1, 20, 1], [50, 20, 1], [[3, 9, 4, 30], [7, 8], [11]]
    starts = [context - length for length, context in zip(lens, contexts, strict=True)]
    inputs = make_inputs(tables, starts, lens)
    query = torch.randn(1, 8, 22, 64).bfloat16()
    key, value = torch.randn(2, 1, 2, 22, 64).bfloat16()
    history = torch.randn(2, 640, 2, 64).bfloat16()
    outputs = []
    for kernels in (CpuCache(), ReferenceCache()):
        shape = KVCacheShape(((2, 64, 64),), 16, torch.bfloat16, is_int8)
        cache = KVCache(shape, 40, torch.device("cpu"), kernels)
        cache.write(0, torch.arange(640), *history)
        context = AttentionContext.of(inputs, cache)
        output, _ = paged_attention(
            SimpleNamespace(layer_idx=0), query, key, value, None, attention_context=context
        )
        outputs.append(output)
    torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)


@needs_compiler
@pytest.mark.parametrize("is_int8", [False, True])
def test_store_puts_numbers_where_attention_reads_them(is_int8: bool) -> None:
    """Of int8, the codes and scales are those of the portable path."""
    torch.manual_seed(0)
    keys, values = torch.randn(48, 3, 64).bfloat16(), torch.randn(48, 3, 32).bfloat16()
    keys[5, 1], keys[6], values[7] = 0, keys[6] * 1e-20, values[7] * 1e20
    pools = make_pools(48, 3, (64, 32), is_int8)
    slots = torch.randperm(48)
    # Heads first, as transformers has them.
    key = keys[slots].transpose(0, 1).contiguous().transpose(0, 1)
    store(slots, key, values[slots], pools)
    for pool, expected in zip(pools.tensors, pack(keys, values, is_int8).tensors, strict=True):
        assert torch.equal(pool, expected)


def test_what_it_cannot_do_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    if load_library() is not None:
        assert can_attend(torch.bfloat16, 64, 64, 16, False)
    assert not can_attend(torch.float32, 64, 64, 16, False)
    assert not can_attend(torch.bfloat16, 24, 64, 16, False)
    assert not can_attend(torch.bfloat16, 64, 64, 8, False)
    assert not can_attend(torch.bfloat16, 64, 1024, 16, True)

    def fail(*args: object) -> None:
        raise BuildError("no C++ compiler (g++)")

    monkeypatch.setattr(attention, "build_library", fail)
    load_library.cache_clear()
    try:
        assert not can_attend(torch.bfloat16, 64, 64, 16, False)
    finally:
        load_library.cache_clear()

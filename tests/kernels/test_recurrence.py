"""Convolutions and recurrences: each kernel against plain loops, and bit for bit in any batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from autotp_serving.kernels.cpu.recurrence import CpuRecurrence, load_recurrence
from autotp_serving.kernels.reference.recurrence import Recurrence, ReferenceRecurrence, Spans

TOKENS, ROWS = 23, 5


def load(isa: str) -> Recurrence:
    found = ReferenceRecurrence() if isa == "reference" else load_recurrence(isa)
    if isa != "reference" and not isinstance(found, CpuRecurrence):
        pytest.skip(f"{isa} is not to be had here")
    return found


def make_spans(rows: list[int], lens: list[int], is_new: list[bool]) -> Spans:
    ends = torch.tensor(lens).cumsum(0)
    return Spans(
        torch.tensor(rows),
        ends - torch.tensor(lens),
        torch.tensor(lens),
        torch.tensor(is_new),
        torch.arange(len(lens)).repeat_interleave(torch.tensor(lens)),
        lens,
    )


def convolution(recurrence: Recurrence, channels: int) -> tuple:
    inputs = torch.randn(TOKENS, channels).bfloat16()
    taps, bias = torch.randn(4, channels), torch.randn(channels)

    def run(spans: Spans, inputs: Tensor, pool: Tensor) -> Tensor:
        return recurrence.convolve(spans, inputs, taps, bias, pool)

    padded = torch.cat([torch.zeros(3, channels), inputs.float()])
    plain = bias + sum(padded[tap : tap + TOKENS] * taps[tap] for tap in range(4))
    return run, [inputs], plain, torch.randn(ROWS, 3, channels).bfloat16()


def gated_delta(recurrence: Recurrence, value_dim: int, decays: tuple[int, ...] = ()) -> tuple:
    given = [torch.randn(TOKENS, heads, size) for heads, size in ((2, 8), (2, 8), (4, value_dim))]
    given[1] = torch.nn.functional.normalize(given[1], dim=-1)
    given += [torch.rand(TOKENS, 4, *decays), torch.rand(TOKENS, 4)]
    plain = torch.empty(TOKENS, 4, value_dim)
    for head in range(4):
        state = torch.zeros(8, value_dim)
        for token in range(TOKENS):
            key, value = given[1][token, head // 2], given[2][token, head]
            state = state * given[3][token, head].view(-1, 1)
            state = state + torch.outer(key, (value - key @ state) * given[4][token, head])
            plain[token, head] = given[0][token, head // 2] @ state
    return recurrence.gated_delta, given, plain, torch.randn(ROWS, 4, 8, value_dim)


def selective_scan(recurrence: Recurrence, state_size: int) -> tuple:
    given = [torch.randn(TOKENS, 4, 6), torch.rand(TOKENS, 4)]
    given += [torch.randn(TOKENS, 3, state_size) for _ in range(2)]
    groups = torch.tensor([0, 0, 1, 2])
    plain = torch.empty(TOKENS, 4, 6)
    for head, group in enumerate(groups):
        state = torch.zeros(6, state_size)
        for token in range(TOKENS):
            entry = torch.outer(given[0][token, head], given[2][token, group])
            state = state * given[1][token, head] + entry
            plain[token, head] = state @ given[3][token, group]

    def run(spans: Spans, *given: Tensor) -> Tensor:
        *others, pool = given
        return recurrence.selective_scan(spans, *others, groups, pool)

    return run, given, plain, torch.randn(ROWS, 4, 6, state_size)


CASES = {
    **{f"convolution-{size}": partial(convolution, channels=size) for size in (7, 130)},
    **{f"delta-{size}": partial(gated_delta, value_dim=size) for size in (6, 48, 64)},
    **{f"delta-by-row-{s}": partial(gated_delta, value_dim=s, decays=(8,)) for s in (6, 80)},
    **{f"scan-{size}": partial(selective_scan, state_size=size) for size in (5, 32)},
}


@pytest.mark.parametrize("isa", ["reference", "amx", "avx2"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_batch_and_any_chunks_give_the_same_bits(isa: str, case: Callable) -> None:
    torch.manual_seed(0)
    run, given, plain, pool = case(load(isa))
    untouched = pool.clone()
    whole = run(make_spans([2], [TOKENS], [True]), *given, pool)
    torch.testing.assert_close(whole, plain, rtol=1e-4, atol=1e-4)
    state = pool[2].clone()
    others = [0, 1, 3, 4]
    assert torch.equal(pool[others], untouched[others])
    # The same tokens in chunks, beside a sequence that goes on and one that begins.
    found = []
    start = 0
    for length in (1, 1, 9, 2, 10):
        stop = start + length
        parts = [torch.cat([one[4:7], one[start:stop], one[:2]]) for one in given]
        spans = make_spans([0, 3, 1], [3, length, 2], [False, start == 0, True])
        found.append(run(spans, *parts, pool)[3 : 3 + length])
        start = stop
    assert torch.equal(torch.cat(found), whole)
    assert torch.equal(pool[3], state)

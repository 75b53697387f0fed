"""Paged attention against plain attention over each whole sequence, step by step."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autotp_serving.config import ConfigError
from autotp_serving.kernels.reference.attention import ReferenceCache
from autotp_serving.model.attention import AttentionContext, paged_attention
from autotp_serving.model.kv_cache import KVCache, KVCacheShape
from tests.model.steps import make_inputs

BLOCK_SIZE = 4
NUM_BLOCKS = 64
HEAD_DIM = 16
LAYER = SimpleNamespace(layer_idx=1)  # not 0: a layer that is mixed up must show


@dataclass
class Sequence:
    """All queries, keys and values of one sequence, of which steps see a part."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    blocks: list[int]
    num_done: int = field(default=0)


def make_cache(
    num_kv_heads: int, dtype: torch.dtype = torch.float32, is_int8: bool = False
) -> KVCache:
    shape = KVCacheShape(((num_kv_heads, HEAD_DIM, HEAD_DIM),) * 2, BLOCK_SIZE, dtype, is_int8)
    return KVCache(shape, NUM_BLOCKS, torch.device("cpu"), ReferenceCache())


def make_sequences(lens: list[int], num_heads: int, num_kv_heads: int) -> list[Sequence]:
    """Random sequences over blocks in random order."""
    torch.manual_seed(0)
    free = random.Random(1).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    return [
        Sequence(
            query=torch.randn(length, num_heads, HEAD_DIM),
            key=torch.randn(length, num_kv_heads, HEAD_DIM),
            value=torch.randn(length, num_kv_heads, HEAD_DIM),
            blocks=[free.pop() for _ in range(-(-length // BLOCK_SIZE))],
        )
        for length in lens
    ]


def run_step(
    cache: KVCache, parts: list[tuple[Sequence, int]], **options: Any
) -> list[torch.Tensor]:
    """Run the next rows of each sequence in one flattened batch; outputs per sequence."""
    starts = [sequence.num_done for sequence, _ in parts]
    query_lens = [query_len for _, query_len in parts]
    inputs = make_inputs([one.blocks for one, _ in parts], starts, query_lens, BLOCK_SIZE)
    spans = [slice(start, start + num) for start, num in zip(starts, query_lens, strict=True)]
    for (sequence, _), span in zip(parts, spans, strict=True):
        sequence.num_done = span.stop

    def flatten(name: str) -> torch.Tensor:
        rows = [getattr(part[0], name)[span] for part, span in zip(parts, spans, strict=True)]
        return torch.cat(rows).transpose(0, 1)[None]

    context = AttentionContext.of(inputs, cache)
    output, weights = paged_attention(
        LAYER,
        flatten("query"),
        flatten("key"),
        flatten("value"),
        None,
        attention_context=context,
        **options,
    )
    assert weights is None
    return list(output[0].split(query_lens))


def plain_attention(
    sequence: Sequence,
    sliding_window: int | None = None,
    softcap: float | None = None,
    scaling: float | None = None,
) -> torch.Tensor:
    """Causal attention over the whole sequence in float64, spelled out: [length, heads, dim]."""
    num_groups = sequence.query.shape[1] // sequence.key.shape[1]
    query = sequence.query.double()
    key = sequence.key.double().repeat_interleave(num_groups, dim=1)
    value = sequence.value.double().repeat_interleave(num_groups, dim=1)
    logits = torch.einsum("qhd,khd->hqk", query, key) * (scaling or HEAD_DIM**-0.5)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    at = torch.arange(len(query))
    hidden = at[None, :] > at[:, None]
    if sliding_window is not None:
        hidden |= at[None, :] <= at[:, None] - sliding_window
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling": 0.4},
        {"sliding_window": 5},
        {"sliding_window": 1},
        {"sliding_window": 1000},
        {"softcap": 3.0},
        {"softcap": 3.0, "sliding_window": 6},
    ],
    ids=str,
)
def test_chunks_and_decodes_equal_plain_attention(
    num_heads: int, num_kv_heads: int, options: dict[str, Any]
) -> None:
    """Whole prompts, chunks of prompts and single tokens side by side, over permuted blocks."""
    sequences = make_sequences([23, 9, 14, 6, 1], num_heads, num_kv_heads)
    expected = [plain_attention(sequence, **options) for sequence in sequences]
    cache = make_cache(num_kv_heads)
    a, b, c, d, e = range(5)
    steps = [
        [(a, 7), (b, 8)],  # a's first chunk beside b's whole prompt
        [(b, 1), (a, 9), (c, 4), (e, 1)],  # decode, chunk, new prompt, a prompt of one token
        [(c, 2), (a, 1), (d, 5)],
        [(d, 1), (a, 1), (c, 1)],  # decodes only, of lengths 6, 18 and 7
        [(a, 3), (c, 7)],
        [(a, 2)],
    ]
    for step in steps:
        starts = [sequences[index].num_done for index, _ in step]
        parts = [(sequences[index], count) for index, count in step]
        outputs = run_step(cache, parts, **options)
        for (index, count), start, output in zip(step, starts, outputs, strict=True):
            assert_close(output, expected[index][start : start + count])
    assert [sequence.num_done for sequence in sequences] == [23, 9, 14, 6, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype: torch.dtype) -> None:
    (sequence,) = make_sequences([21], 8, 2)
    expected = plain_attention(sequence)
    for name in ("query", "key", "value"):
        setattr(sequence, name, getattr(sequence, name).to(dtype))
    cache = make_cache(2, dtype)
    outputs = [run_step(cache, [(sequence, count)])[0] for count in (12, 8, 1)]
    assert outputs[0].dtype == dtype
    assert (torch.cat(outputs).double() - expected).abs().max() < 0.05


def test_int8_sees_the_rounded_numbers_of_all_however_the_prompt_is_cut() -> None:
    """A prompt at once, in pieces, token by token: the same as over what the cache gives back."""
    (sequence,) = make_sequences([20], 4, 2)
    for counts in ((20,), (7, 12, 1), (1,) * 20):
        sequence.num_done = 0
        cache = make_cache(2, is_int8=True)
        outputs = [run_step(cache, [(sequence, count)])[0] for count in counts]
        slots = torch.tensor(sequence.blocks)[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        key, value = cache.layer(LAYER.layer_idx).read(slots.flatten()[:20], torch.float32)
        assert (key != sequence.key).any()
        expected = plain_attention(Sequence(sequence.query, key, value, []))
        assert_close(torch.cat(outputs), expected)


def test_two_sequences_may_share_blocks() -> None:
    """As prefix reuse has it: the second begins behind blocks that the first has filled."""
    first, second = make_sequences([12, 12], 4, 2)
    for name in ("query", "key", "value"):
        getattr(second, name)[:8] = getattr(first, name)[:8]
    second.blocks[:2] = first.blocks[:2]
    second.num_done = 8
    cache = make_cache(2)
    (output,) = run_step(cache, [(first, 11)])
    assert_close(output, plain_attention(first)[:11])
    decode, chunk = run_step(cache, [(first, 1), (second, 4)])
    assert_close(decode, plain_attention(first)[11:])
    assert_close(chunk, plain_attention(second)[8:])


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"sliding_window": 3}], ids=str)
def test_nan_of_one_request_reaches_no_other(options: dict[str, Any], is_int8: bool) -> None:
    """Overflow in float16 makes NaN: in a neighbour's blocks, in block 0 that pads short decodes,
    and left behind in a block that the next sequence has not filled yet."""
    short, long = make_sequences([3, 22], 4, 2)
    long.blocks[0] = 0
    cache = make_cache(2, is_int8=is_int8)
    everywhere = torch.arange(NUM_BLOCKS * BLOCK_SIZE)
    nan = torch.full((len(everywhere), 2, HEAD_DIM), float("nan"))
    cache.write(LAYER.layer_idx, everywhere, nan, nan)
    long.key[0], long.value[0] = float("nan"), float("nan")
    expected = plain_attention(short, **options)
    outputs = [run_step(cache, [(short, 2), (long, 21)], **options)[0]]
    decode, spoiled = run_step(cache, [(short, 1), (long, 1)], **options)
    tolerance = 0.05 if is_int8 else 2e-5
    torch.testing.assert_close(
        torch.cat([*outputs, decode]).double(), expected, atol=tolerance, rtol=tolerance
    )
    if "sliding_window" not in options:
        assert spoiled.isnan().all()


def test_an_architecture_that_drops_the_context_is_refused_by_name() -> None:
    tensor = torch.zeros(1, 1, 1, HEAD_DIM)
    with pytest.raises(ConfigError, match="cannot be served"):
        paged_attention(torch.nn.Identity(), tensor, tensor, tensor, None)


def test_attention_sinks_take_their_share() -> None:
    """Silently left out they would change every completion."""
    plain, none, equal, all_of_it = (
        run_step(make_cache(2), [(make_sequences([3], 2, 2)[0], 3)], s_aux=sinks)[0]
        for sinks in (None, *(torch.full((2,), value) for value in (-1e4, 0.0, 1e4)))
    )
    assert torch.allclose(none, plain, atol=1e-6)
    assert (equal.norm(dim=-1) < plain.norm(dim=-1)).all()
    cosine = torch.cosine_similarity(equal, plain, dim=-1)
    assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-5)
    assert torch.equal(all_of_it, torch.zeros_like(plain))

"""Triton's attention kernels beside plain attention in float32: on a card if there is one, else by
Triton's interpreter on the CPU.

Slots that no sequence owns hold NaN in every test, and so does the output before it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import choose_device

DEVICE = choose_device()

from autotp_serving.kernels.kv_pools import Pools  # noqa: E402
from autotp_serving.kernels.triton import attention  # noqa: E402
from autotp_serving.kernels.triton.cards import DecodeTiles, PrefillTiles  # noqa: E402
from autotp_serving.kernels.triton.decode import allocate_workspace  # noqa: E402

ON_CARD = DEVICE.type == "cuda"
needs_card = pytest.mark.skipif(not ON_CARD, reason="no CUDA card here")
BY_DOT = DecodeTiles(16, 4, 2, min_split=32, max_splits=4, use_dot=True, merges=True)
BY_SUM = DecodeTiles(16, 4, 1, min_split=32, max_splits=4, use_dot=False, merges=False)
BY_PAIRS = replace(BY_DOT, many_rows=3, splits_of_many=2)
PREFILL = PrefillTiles(queries=16, keys=32, warps=4, stages=2)
BORDERS = (0, 1, 32, 33, 129)
"""Contexts: padding, one token, the borders of a split; the last has splits of 48."""


@dataclass(frozen=True)
class Case:
    """Sequences with their whole context in the cache, and the queries of their last tokens.

    Attributes:
        spans: per sequence (query_len, context_len).
        keys, values: per sequence [context_len, num_kv_heads, head_dim], as the cache holds them.
    """

    spans: tuple[tuple[int, int], ...]
    block_size: int
    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    pools: Pools
    block_tables: Tensor

    def run(
        self,
        verb: str,
        tiles: DecodeTiles,
        seqs: Sequence[int] | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        scaling: float | None = None,
    ) -> list[Tensor]:
        """Outputs per sequence, of those in `seqs` (default: all) as one batch."""
        seqs = range(len(self.spans)) if seqs is None else seqs
        lens = [self.spans[seq][0] for seq in seqs]
        queries = self.query.split([length for length, _ in self.spans])
        query = torch.cat([queries[seq] for seq in seqs])
        counts = {"dtype": torch.int32, "device": DEVICE}
        inputs = SimpleNamespace(
            rows=torch.tensor(list(seqs), **counts),
            query_starts=torch.tensor([0, *lens], **counts).cumsum(0).to(torch.int32),
            context_lens=torch.tensor([self.spans[seq][1] for seq in seqs], **counts),
            block_tables=self.block_tables,
            num_seqs=len(lens),
            num_tokens=sum(lens),
            max_query_len=max(lens),
            is_decode=max(lens) == 1,
        )
        num_heads, head_dim = query.shape[1:]
        splits = allocate_workspace(len(lens), num_heads, head_dim, tiles, DEVICE)
        splits.sums.fill_(float("nan"))
        splits.stats.fill_(float("nan"))
        workspace = attention.Workspace(self.block_size, tiles, PREFILL, splits)
        out = torch.full_like(query, float("nan"))
        scaling = head_dim**-0.5 if scaling is None else scaling
        attend = getattr(attention, verb)
        result = attend(query, self.pools, inputs, scaling, window, softcap, sinks, out, workspace)
        assert result is out
        assert not splits.arrivals.any(), "a later step would merge too early"
        return list(out.split(lens))

    def exact(
        self,
        seq: int,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        scaling: float | None = None,
    ) -> Tensor:
        """What a sequence's output should be, [query_len, num_heads, head_dim] float32."""
        query = self.query.split([length for length, _ in self.spans])[seq].float()
        if self.spans[seq][1] == 0:
            return torch.zeros_like(query)
        key, value = self.keys[seq].float(), self.values[seq].float()
        group = query.shape[1] // key.shape[1]
        key, value = (rows.repeat_interleave(group, 1) for rows in (key, value))
        scaling = query.shape[2] ** -0.5 if scaling is None else scaling
        logits = torch.einsum("qhd,nhd->hqn", query, key) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        position = torch.arange(len(key), device=query.device)
        query_position = position[len(key) - len(query) :, None]
        seen = position <= query_position
        if window is not None:
            seen &= position > query_position - window
        logits = logits.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            extra = sinks.float()[:, None, None].expand(-1, len(query), 1)
            logits = torch.cat([logits, extra], -1)
        weights = logits.softmax(-1)[..., : len(key)]
        return torch.einsum("hqn,nhd->qhd", weights, value)

    def check(self, outputs: list[Tensor], seqs: Sequence[int] | None = None, **options) -> None:
        """Outputs of a run with the same options must be near exact ones."""
        seqs = range(len(self.spans)) if seqs is None else seqs
        for seq, output in zip(seqs, outputs, strict=True):
            exact = self.exact(seq, **options)
            torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02)


def make_case(
    spans: Sequence[tuple[int, int]],
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    is_int8: bool = False,
    query_scale: float = 1.0,
) -> Case:
    """Random sequences, stored by torch in blocks at random places of a cache of NaN."""
    generator = torch.Generator().manual_seed(sum(map(sum, spans)) + head_dim)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).to(DEVICE)

    num_heads, num_kv_heads = heads
    blocks = [-(-length // block_size) for _, length in spans]
    num_blocks = sum(blocks) + 3
    size = (num_blocks * block_size, num_kv_heads, head_dim)
    if is_int8:
        codes = [torch.full(size, 99, dtype=torch.int8, device=DEVICE) for _ in range(2)]
        scales = [torch.full(size[:2], float("nan"), device=DEVICE) for _ in range(2)]
        pools = Pools(*codes, *scales)
    else:
        empty = [torch.full(size, float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
        pools = Pools(*empty)
    order = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    # What is past a sequence's blocks is another's, or nobody's.
    tables = torch.full((len(spans), max(blocks) + 1), int(order[-1]), dtype=torch.int32)
    keys, values = [], []
    for seq, (_, length) in enumerate(spans):
        tables[seq, : blocks[seq]] = order[sum(blocks[:seq]) :][: blocks[seq]]
        slots = (tables[seq, :, None] * block_size + torch.arange(block_size)).flatten()
        slots = slots[:length].long().to(DEVICE)
        key, value = draw(length, num_kv_heads, head_dim), draw(length, num_kv_heads, head_dim)
        pools.write(slots, key, value)
        stored = pools.read(slots, torch.float32) if is_int8 else (key, value)
        keys.append(stored[0])
        values.append(stored[1])
    query = draw(sum(length for length, _ in spans), num_heads, head_dim) * query_scale
    return Case(tuple(spans), block_size, query, keys, values, pools, tables.to(DEVICE))


def singles(*context_lens: int) -> list[tuple[int, int]]:
    return [(1, length) for length in context_lens]


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "is_int8", "tiles"),
    [
        ((1, 1), 128, 16, False, BY_SUM),
        ((1, 1), 128, 16, True, BY_DOT),
        ((2, 2), 64, 32, False, BY_DOT),
        ((3, 1), 64, 16, True, BY_SUM),
        ((7, 1), 80, 48, False, BY_DOT),
        ((2, 1), 80, 48, True, BY_SUM),
        ((4, 1), 96, 16, True, BY_DOT),
        ((2, 1), 96, 16, False, BY_SUM),
        ((16, 1), 256, 64, True, BY_DOT),
        ((1, 1), 256, 64, False, BY_SUM),
    ],
)
def test_decode(
    heads: tuple[int, int], head_dim: int, block_size: int, is_int8: bool, tiles: DecodeTiles
) -> None:
    case = make_case(singles(*BORDERS), heads, head_dim, block_size, is_int8=is_int8)
    case.check(case.run("decode", tiles))


@pytest.mark.parametrize("use_dot", [True, False], ids=["dot", "sum"])
@pytest.mark.parametrize("merges", [True, False], ids=["same", "own"])
def test_splits_are_merged_either_way(use_dot: bool, merges: bool) -> None:
    case = make_case(singles(0, 40, 129), dtype=torch.float16)
    tiles = replace(BY_DOT if use_dot else BY_SUM, merges=merges)
    case.check(case.run("decode", tiles))


OPTIONS = {
    "window": {"window": 37},
    "window of a tile": {"window": 16},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": (3.0, -40.0)},
    "all": {"window": 50, "softcap": 20.0, "sinks": (0.5, 9.0), "scaling": 0.2},
}


def choose_options(name: str) -> dict[str, object]:
    options = dict(OPTIONS[name])
    if "sinks" in options:
        options["sinks"] = torch.tensor(options["sinks"], dtype=torch.bfloat16, device=DEVICE)
    return options


@pytest.mark.parametrize("tiles", [BY_DOT, BY_SUM], ids=["dot", "sum"])
@pytest.mark.parametrize("name", OPTIONS)
def test_decode_options(name: str, tiles: DecodeTiles) -> None:
    case = make_case(singles(0, 1, 37, 130))
    options = choose_options(name)
    case.check(case.run("decode", tiles, **options), **options)


@pytest.mark.parametrize("tiles", [BY_DOT, BY_SUM], ids=["dot", "sum"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_large_logits(tiles: DecodeTiles, softcap: float | None) -> None:
    case = make_case([(1, 100), (3, 40)], query_scale=1000.0)
    outputs = case.run("prefill", tiles, softcap=softcap)
    case.check(outputs, softcap=softcap)


MIXED = ((5, 5), (1, 70), (37, 100), (16, 16), (1, 1), (20, 129))


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "is_int8"),
    [((2, 1), 64, 16, False), ((1, 1), 80, 48, True), ((3, 1), 128, 32, False)],
)
def test_prefill(heads: tuple[int, int], head_dim: int, block_size: int, is_int8: bool) -> None:
    case = make_case(MIXED, heads, head_dim, block_size, is_int8=is_int8)
    case.check(case.run("prefill", BY_DOT))


@pytest.mark.parametrize("name", OPTIONS)
def test_prefill_options(name: str) -> None:
    case = make_case([(20, 20), (1, 50), (18, 90)])
    options = choose_options(name)
    case.check(case.run("prefill", BY_DOT, **options), **options)


@pytest.mark.parametrize("tiles", [BY_DOT, BY_SUM, BY_PAIRS], ids=["dot", "sum", "pairs"])
def test_a_row_is_the_same_alone_and_among_others(tiles: DecodeTiles) -> None:
    case = make_case([(1, 129), (1, 40), (9, 50), (1, 0), (1, 77)])
    mixed = case.run("prefill", tiles)
    decoded = case.run("decode", tiles, [0, 1, 3, 4])
    for seq, among in zip((0, 1, 3, 4), decoded, strict=True):
        (alone,) = case.run("decode", tiles, [seq])
        assert torch.equal(among, alone)
        assert torch.equal(mixed[seq], alone)
    assert torch.equal(mixed[2], case.run("prefill", tiles, [2])[0])


@pytest.mark.parametrize("tiles", [BY_DOT, BY_SUM], ids=["dot", "sum"])
@pytest.mark.parametrize("window", [None, 50])
def test_a_row_is_the_same_whoever_takes_its_splits(tiles: DecodeTiles, window: int | None) -> None:
    case = make_case(singles(0, 1, 33, 129, 200))
    expected = case.run("decode", tiles, window=window)
    for splits in (2, 4):
        outputs = case.run("decode", replace(tiles, splits_of_many=splits), window=window)
        for one, other in zip(outputs, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("window", [None, 21])
def test_a_prompt_is_the_same_at_once_and_in_chunks(window: int | None) -> None:
    whole = make_case([(75, 75)])
    (at_once,) = whole.run("prefill", BY_DOT, window=window)
    pieces = []
    for start, stop in ((0, 19), (19, 50), (50, 75)):
        chunk = replace(whole, spans=((stop - start, stop),), query=whole.query[start:stop])
        pieces += chunk.run("prefill", BY_DOT, window=window)
    assert torch.equal(torch.cat(pieces), at_once)


def test_queries_may_be_a_slice_of_a_wider_product() -> None:
    case = make_case(singles(40, 7), heads=(2, 1))
    wide = torch.full((2, 5, 64), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    wide[:, 1:3] = case.query
    outputs = case.run("decode", BY_DOT)
    queries = wide[:, 1:3]
    sliced = replace(case, query=queries)
    assert torch.equal(torch.cat(sliced.run("decode", BY_DOT)), torch.cat(outputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_stored_codes_are_those_of_the_reference(dtype: torch.dtype, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    wide = torch.randn((9, 5, head_dim), generator=generator)
    wide *= torch.logspace(-6, 4, 9)[:, None, None]
    wide[0, 1] = 0
    wide[1, 2, 3] = float("nan")
    wide[2, 1, 7] = float("inf")
    wide[3, 1, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # halves, to even
    wide = wide.to(dtype)
    key, value = wide[:, 1:3], wide[:, 3:5]
    slots = torch.tensor([5, 0, -1, 63, 17, 18, -1, 40, 2])
    size = (64, 2, head_dim)
    expected = Pools(
        *(torch.full(size, 7, dtype=torch.int8) for _ in range(2)),
        *(torch.full(size[:2], -1.0) for _ in range(2)),
    )
    is_written = slots >= 0
    expected.write(slots[is_written], key[is_written], value[is_written])
    stored = Pools(
        *(torch.full(size, 7, dtype=torch.int8, device=DEVICE) for _ in range(2)),
        *(torch.full(size[:2], -1.0, device=DEVICE) for _ in range(2)),
    )
    wide = wide.to(DEVICE)
    attention.store(wide[:, 1:3], wide[:, 3:5], slots.to(DEVICE), stored)
    for ours, theirs in zip(stored.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0, equal_nan=True)


def test_stored_rows_are_as_they_came() -> None:
    key, value = torch.randn((2, 6, 3, 96), dtype=torch.bfloat16, device=DEVICE)
    slots = torch.tensor([3, 31, -1, 0, 8, -1], device=DEVICE)
    pools = Pools(*(torch.full((32, 3, 96), 7.0, device=DEVICE).bfloat16() for _ in range(2)))
    attention.store(key, value, slots, pools)
    for pool, rows in ((pools.keys, key), (pools.values, value)):
        expected = torch.full_like(pool, 7.0)
        expected[slots[slots >= 0]] = rows[slots >= 0]
        assert torch.equal(pool, expected)


def test_what_the_kernels_take() -> None:
    assert attention.can_attend(torch.bfloat16, 32, 8, 128, 128, 16)
    for shape in ((torch.float32, 32, 8, 128, 128, 16), (torch.bfloat16, 32, 8, 192, 128, 16)):
        assert not attention.can_attend(*shape)
    workspace = attention.allocate_workspace(3, 4, 2, 64, 16, False, DEVICE)
    splits = workspace.decode_tiles.max_splits
    assert workspace.num_bytes == 3 * 4 * (splits * (64 + 2) * 4 + 4)


@needs_card
@pytest.mark.parametrize("is_int8", [False, True], ids=["bf16", "int8"])
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (8, 1)])
def test_long_contexts_with_the_cards_own_tiles(heads: tuple[int, int], is_int8: bool) -> None:
    spans = [*singles(20000, 1, 1060, 4097, 0), (1000, 9000), (130, 130)]
    case = make_case(spans, heads, 128, is_int8=is_int8)
    tiles = attention.choose_decode(attention.find_card(DEVICE), heads[0] // heads[1], 128, is_int8)
    for window in (None, 4096):
        case.check(case.run("prefill", tiles, window=window), window=window)
    for seq in range(5):
        assert torch.equal(
            case.run("decode", tiles, [seq])[0], case.run("decode", tiles, range(5))[seq]
        )


@needs_card
def test_decode_in_a_graph_with_padding() -> None:
    case = make_case(singles(300, 77, 5), (8, 2), 128)
    counts = {"dtype": torch.int32, "device": DEVICE}
    inputs = SimpleNamespace(
        rows=torch.zeros(4, **counts),
        query_starts=torch.arange(5, **counts),
        context_lens=torch.zeros(4, **counts),
        block_tables=case.block_tables,
        num_seqs=4,
        num_tokens=4,
        max_query_len=1,
        is_decode=True,
    )
    query = torch.zeros((4, 8, 128), dtype=torch.bfloat16, device=DEVICE)
    out = torch.full_like(query, float("nan"))
    workspace = attention.allocate_workspace(4, 8, 2, 128, 16, False, DEVICE)

    def attend() -> None:
        attention.decode(query, case.pools, inputs, 128**-0.5, None, None, None, out, workspace)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for num_rows in (3, 1, 2):
        inputs.rows[:num_rows] = torch.arange(num_rows, **counts)
        inputs.context_lens.zero_()
        lens = [length for _, length in case.spans[:num_rows]]
        inputs.context_lens[:num_rows] = torch.tensor(lens, **counts)
        query[:num_rows] = case.query[:num_rows]
        out.fill_(float("nan"))
        graph.replay()
        case.check(list(out[:num_rows].split(1)), range(num_rows))
        assert not out[num_rows:].any()

"""What a rank makes of batches: positions, slots, tables and tokens, from one step to the next."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from autotp_serving.batch import Batch
from autotp_serving.model.batch_state import BatchState
from autotp_serving.model.step_inputs import NOT_WRITTEN, StepInputs

BLOCK_SIZE = 4
CPU = torch.device("cpu")


def make_state(max_rows: int = 4, num_drafts: int = 0) -> BatchState:
    return BatchState(max_rows, 8, BLOCK_SIZE, CPU, num_drafts)


def join(rows: list[int], lens: list[int], tables: list[list[int]]) -> Batch:
    """Whole prompts in new rows, each token its position; all get a token."""
    return Batch(
        rows,
        starts=[0] * len(rows),
        query_lens=lens,
        num_known=list(lens),
        token_ids=[token for length in lens for token in range(length)],
        grown=list(range(len(rows))),
        first_blocks=[0] * len(rows),
        num_new_blocks=[len(table) for table in tables],
        new_blocks=[block for table in tables for block in table],
        sampled=list(range(len(rows))),
    )


def assert_dtypes(inputs: StepInputs) -> None:
    longs = (inputs.token_ids, inputs.positions, inputs.slots, inputs.logit_rows)
    ints = (inputs.rows, inputs.query_starts, inputs.context_lens, inputs.block_tables)
    assert {one.dtype for one in longs} == {torch.int64}
    assert {one.dtype for one in ints} == {torch.int32}


def test_prompts_and_then_tokens_that_only_the_device_knows() -> None:
    state = make_state()
    batch = join([2, 0], [6, 1], [[5, 9], [3]])
    inputs = state.apply(batch)
    assert_dtypes(inputs)
    assert inputs.token_ids.tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert inputs.positions.tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert inputs.slots.tolist() == [20, 21, 22, 23, 36, 37, 12]
    assert inputs.rows.tolist() == [2, 0]
    assert inputs.query_starts.tolist() == [0, 6, 7]
    assert inputs.context_lens.tolist() == [6, 1]
    assert inputs.logit_rows.tolist() == [5, 6]
    assert inputs.block_tables[2, :2].tolist() == [5, 9]
    assert not inputs.is_decode and (inputs.max_query_len, inputs.max_context_len) == (6, 6)
    state.put_tokens(batch, torch.tensor([[41], [-1]]))
    inputs = state.apply(Batch([0, 2], [1, 6], [1, 1], [1, 0], [77], sampled=[0, 1]))
    assert_dtypes(inputs)
    assert inputs.is_decode
    assert inputs.token_ids.tolist() == [77, 41]
    assert inputs.positions.tolist() == [1, 6]
    assert inputs.slots.tolist() == [13, 38]
    assert inputs.context_lens.tolist() == [2, 7]
    assert inputs.logit_rows.tolist() == [0, 1]
    inputs = state.apply(Batch([0], [1], [1], [0], [], sampled=[0]))
    assert inputs.token_ids.tolist() == [0], "an invalid token must not reach the embedding"


def test_a_table_grows_is_mended_from_a_place_on_and_begins_anew() -> None:
    state = make_state()
    state.apply(join([1], [8], [[5, 6]]))

    def update(first: int, blocks: list[int], start: int) -> StepInputs:
        return state.apply(
            Batch([1], [start], [1], [1], [0], [0], [first], [len(blocks)], blocks, [0])
        )

    assert update(2, [7], 8).slots.tolist() == [28]
    assert update(1, [2, 7], 9).block_tables[1, :3].tolist() == [5, 2, 7]
    inputs = update(0, [4], 0)
    assert inputs.slots.tolist() == [16] and inputs.context_lens.tolist() == [1]


def test_only_some_get_a_token_and_prompts_are_scored() -> None:
    state = make_state()
    batch = join([0, 1, 3], [3, 2, 4], [[1], [2], [3]])
    batch.sampled = [0, 2]
    batch.score_rows = [3, 5, 6]
    assert state.apply(batch).logit_rows.tolist() == [2, 8, 3, 5, 6]
    one = Batch([0, 1], [3, 2], [1, 1], [1, 1], [7, 8], sampled=[1])
    assert state.apply(one).logit_rows.tolist() == [1]


def test_drafts_come_from_their_columns() -> None:
    state = make_state(num_drafts=2)
    batch = join([0, 1], [2, 2], [[1], [2]])
    state.apply(batch)
    state.put_tokens(batch, torch.tensor([[10, 11, 12], [20, 21, 22]]))
    inputs = state.apply(Batch([1, 0], [2, 2], [2, 1], [0, 0], [], num_drafts=[1, 0]))
    assert inputs.token_ids.tolist() == [20, 21, 10]
    assert inputs.positions.tolist() == [2, 3, 2]


def test_drafts_as_sequences_of_their_own_are_the_same_tokens() -> None:
    state = make_state()
    state.reserve(64, 9)
    state.apply(join([3, 1, 0], [6, 5, 7], [[5, 9], [3, 2], [4, 6]]))
    batch = Batch(
        rows=[0, 3, 1],
        starts=[7, 6, 5],
        query_lens=[4, 3, 2],
        num_known=[4, 3, 2],
        token_ids=list(range(70, 79)),
        grown=[0, 1],
        first_blocks=[2, 2],
        num_new_blocks=[1, 1],
        new_blocks=[8, 7],
        sampled=[0, 2],
        score_rows=[5],
        num_drafts=[3, 0, 1],
        adapters=[2, 0, 1],
    )
    spread = batch.spread_drafts()
    assert spread.num_samples == batch.num_samples and not spread.num_drafts
    assert spread.query_lens == [1, 1, 1, 1, 3, 1, 1]
    assert spread.adapters == [2, 2, 2, 2, 0, 1, 1]
    expected, found = state.apply(batch), state.apply(spread)
    for name in ("token_ids", "positions", "slots", "logit_rows"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    assert found.rows.tolist() == [0, 0, 0, 0, 3, 1, 1]
    assert found.context_lens.tolist() == [8, 9, 10, 11, 9, 6, 7]
    assert found.query_starts.tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    assert replace(batch, num_drafts=[]).spread_drafts() == replace(batch, num_drafts=[])


def test_a_padded_decode_step_does_nothing_for_its_padding() -> None:
    state = make_state()
    state.apply(join([0, 1], [2, 3], [[1], [2]]))
    inputs = state.apply(Batch([1, 0], [3, 2], [1, 1], [1, 1], [7, 8], sampled=[0, 1]), 4)
    assert_dtypes(inputs)
    assert (inputs.num_seqs, inputs.num_tokens) == (4, 4)
    assert inputs.token_ids.tolist() == [7, 8, 0, 0]
    assert inputs.rows.tolist() == [1, 0, 4, 4]
    assert inputs.slots.tolist() == [11, 6, NOT_WRITTEN, NOT_WRITTEN]
    assert inputs.context_lens.tolist() == [4, 3, 0, 0]
    assert inputs.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert inputs.logit_rows.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_any_steps_give_each_token_its_slot(seed: int) -> None:
    """Against what the whole tables say."""
    rng = random.Random(seed)
    state = make_state(6)
    tables: dict[int, list[int]] = {}
    lens: dict[int, int] = {}
    for _ in range(30):
        rows = rng.sample(range(6), rng.randint(1, 6))
        longest = rng.choice([1, 12])
        batch = Batch([], [], [], [], [])
        expected: list[tuple[int, int]] = []
        for index, row in enumerate(rows):
            if lens.get(row, 32) > 20:
                tables[row], lens[row] = [], 0
            start, count = lens[row], rng.randint(1, longest)
            first = len(tables[row])
            while len(tables[row]) * BLOCK_SIZE < start + count:
                tables[row].append(rng.randrange(100))
            if len(tables[row]) > first:
                batch.grown.append(index)
                batch.first_blocks.append(first)
                batch.num_new_blocks.append(len(tables[row]) - first)
                batch.new_blocks += tables[row][first:]
            batch.rows.append(row)
            batch.starts.append(start)
            batch.query_lens.append(count)
            batch.num_known.append(count)
            batch.token_ids += [rng.randrange(1000) for _ in range(count)]
            for at in range(start, start + count):
                expected.append((at, tables[row][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE))
            lens[row] = start + count
        batch.sampled = list(range(len(rows)))
        inputs = state.apply(batch)
        assert_dtypes(inputs)
        assert inputs.query_starts.tolist() == list(accumulate(batch.query_lens, initial=0))
        assert inputs.logit_rows.tolist() == (inputs.query_starts[1:] - 1).tolist()
        found = zip(inputs.positions.tolist(), inputs.slots.tolist(), strict=True)
        assert list(found) == expected
        assert inputs.token_ids.tolist() == batch.token_ids
        assert inputs.context_lens.tolist() == [lens[row] for row in rows]

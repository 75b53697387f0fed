"""A batch survives its journey: what a follower unpacks is what rank 0 packed, and it is small."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autotp_serving.batch import Batch


def draw_batch(rng: random.Random) -> Batch:
    """Any lists of the right lengths; a batch's bytes do not depend on their sense."""
    num_seqs = rng.randrange(5)
    longest = rng.choice([1, 40])
    query_lens = [rng.randint(1, longest) for _ in range(num_seqs)]
    num_known = [length - rng.randrange(2) for length in query_lens]
    grown = sorted(rng.sample(range(num_seqs), rng.randint(0, num_seqs)))
    num_new_blocks = [rng.randrange(9) for _ in grown]

    def numbers(count: int) -> list[int]:
        return [rng.choice([0, 1, rng.randrange(2**31), 2**31 - 1]) for _ in range(count)]

    return Batch(
        rows=numbers(num_seqs),
        starts=numbers(num_seqs),
        query_lens=query_lens,
        num_known=rng.choice([num_known, list(query_lens), [0] * num_seqs]),
        token_ids=numbers(sum(num_known)),
        grown=grown,
        first_blocks=numbers(len(grown)),
        num_new_blocks=num_new_blocks,
        new_blocks=numbers(sum(num_new_blocks)),
        sampled=sorted(rng.sample(range(num_seqs), rng.randint(0, num_seqs))),
        score_rows=numbers(rng.randrange(4)),
        num_top=rng.choice([[], numbers(num_seqs)]),
        num_drafts=rng.choice([[], numbers(num_seqs)]),
        adapters=rng.choice([[], numbers(num_seqs)]),
        state_copies=rng.choice([[], numbers(4)]),
    )


@pytest.mark.parametrize("seed", range(300))
def test_bytes_hold_the_whole_batch(seed: int) -> None:
    batch = draw_batch(random.Random(seed))
    assert Batch.from_bytes(batch.to_bytes()) == batch


def test_an_empty_batch_is_not_the_stop_message() -> None:
    """Followers stop at an empty message: no batch may look like one."""
    batch = Batch([], [], [], [], [])
    assert batch.to_bytes()
    assert Batch.from_bytes(batch.to_bytes()) == batch


def test_a_number_that_does_not_fit_is_refused_and_not_wrapped() -> None:
    with pytest.raises(OverflowError):
        Batch([0], [0], [1], [1], [2**31]).to_bytes()


@pytest.mark.parametrize("is_known", [True, False])
def test_a_decode_step_of_256_long_sequences_is_small(is_known: bool) -> None:
    """512 blocks each, every sixteenth needs a new one, and each has an adapter and 3 drafts."""
    rows = list(range(256))
    grown = rows[::16]
    batch = Batch(
        rows=rows,
        starts=[512 * 16 - 1 - row for row in rows],
        query_lens=[1] * 256,
        num_known=[int(is_known)] * 256,
        token_ids=[128_000] * 256 if is_known else [],
        grown=grown,
        first_blocks=[511] * len(grown),
        num_new_blocks=[1] * len(grown),
        new_blocks=[100_000] * len(grown),
        sampled=rows,
    )
    assert len(batch.to_bytes()) < 4 * 1024
    assert len(replace(batch, num_top=[64] * 256).to_bytes()) < 5 * 1024
    fullest = replace(batch, query_lens=[4] * 256, num_drafts=[3] * 256, adapters=[1] * 256)
    assert len(fullest.to_bytes()) < 8 * 1024

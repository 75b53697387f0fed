"""Blocks: nothing lost, nothing shared that differs, least recently used goes first."""

from __future__ import annotations

import random

import pytest

from autotp_serving.engine.block_manager import BlockManager

BLOCK_SIZE = 4
AMPLE = 1000
"""Blocks for the random test in which nothing is ever evicted."""


def fill(blocks: BlockManager, tokens: list[int]) -> list[int]:
    """Hold blocks for all tokens, as a sequence that ran them does; reuse what is known."""
    table: list[int] = []
    matched = blocks.match(tokens)
    blocks.take(table, matched)
    assert blocks.grow(table, len(tokens))
    for index in range(len(matched), len(tokens) // BLOCK_SIZE):
        blocks.register(table, index, tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
    return table


def test_grow_takes_blocks_only_at_block_borders_and_all_or_nothing():
    blocks = BlockManager(3, BLOCK_SIZE)
    table: list[int] = []
    for num_tokens, num_blocks in ((1, 1), (4, 1), (5, 2), (12, 3)):
        assert blocks.grow(table, num_tokens)
        assert len(table) == num_blocks
    other: list[int] = []
    assert not blocks.grow(table, 13)
    assert not blocks.grow(other, 1)
    assert len(table) == 3 and other == []
    blocks.release(table)
    assert table == [] and blocks.num_held == 0
    assert not blocks.grow(other, 13) and other == [] and blocks.num_held == 0
    blocks.check_integrity([])


def test_reuse_never_covers_the_whole_prompt():
    blocks = BlockManager(8, BLOCK_SIZE)
    table = fill(blocks, list(range(8)))
    assert blocks.match(list(range(8))) == table[:1]
    assert blocks.match(list(range(9))) == table[:2]
    assert blocks.match([0]) == []


def test_a_block_is_found_only_under_the_same_beginning():
    blocks = BlockManager(8, BLOCK_SIZE)
    first = fill(blocks, [1, 1, 1, 1, 7, 7, 7, 7, 0])
    second = fill(blocks, [2, 2, 2, 2, 7, 7, 7, 7, 0])
    assert set(first).isdisjoint(second)
    assert blocks.match([3, 3, 3, 3, 7, 7, 7, 7, 0]) == []
    assert blocks.match([7, 7, 7, 7, 0]) == []


def test_unregistered_blocks_are_not_found():
    blocks = BlockManager(8, BLOCK_SIZE)
    table: list[int] = []
    blocks.grow(table, 9)
    assert blocks.match(list(range(9))) == []
    blocks.release(table)
    assert blocks.match(list(range(9))) == []
    blocks.check_integrity([])


def test_equal_blocks_registered_twice_become_one():
    """Two equal prompts in one step cannot see each other's blocks, but share them afterwards."""
    blocks = BlockManager(8, BLOCK_SIZE)
    tables: list[list[int]] = [[], []]
    for table in tables:
        blocks.grow(table, 9)
    assert blocks.num_held == 6
    for index in range(2):
        for table in tables:
            blocks.register(table, index, [5] * BLOCK_SIZE)
    assert tables[0][:2] == tables[1][:2] and tables[0][2] != tables[1][2]
    assert blocks.num_held == 4
    blocks.check_integrity(tables)
    blocks.release(tables[0])
    assert blocks.match([5] * 9) == tables[1][:2]
    blocks.check_integrity(tables[1:])


def test_a_table_shrinks_to_what_its_tokens_need():
    """Blocks taken for tokens that did not come to stay go back; shared ones stay with others."""
    blocks = BlockManager(8, BLOCK_SIZE)
    table = fill(blocks, list(range(9)))
    other: list[int] = []
    blocks.take(other, blocks.match(list(range(9))))
    assert blocks.grow(table, 6 * BLOCK_SIZE)
    blocks.shrink(table, 2 * BLOCK_SIZE + 1)
    assert len(table) == 3 and blocks.num_held == 3
    blocks.shrink(table, BLOCK_SIZE)
    assert len(table) == 1 and len(other) == 2
    blocks.check_integrity([table, other])
    blocks.shrink(table, 3 * BLOCK_SIZE)
    assert len(table) == 1, "it never grows"
    blocks.shrink(table, 0)
    assert not table
    blocks.check_integrity([table, other])


def test_oldest_content_goes_first_and_its_end_before_its_beginning():
    blocks = BlockManager(6, BLOCK_SIZE)
    old, new = list(range(9)), list(range(50, 59))
    for tokens in (old, new):
        blocks.release(fill(blocks, tokens))
    blocks.release(fill(blocks, old))  # now `new` is the one used least recently
    held: list[int] = []
    assert blocks.grow(held, 3 * BLOCK_SIZE)  # two free blocks and one cached
    assert len(blocks.match(old)) == 2 and len(blocks.match(new)) == 1
    assert blocks.grow(held, 5 * BLOCK_SIZE)
    assert len(blocks.match(old)) == 1 and len(blocks.match(new)) == 0
    blocks.check_integrity([held])


def test_blocks_in_use_are_never_taken():
    blocks = BlockManager(3, BLOCK_SIZE)
    table = fill(blocks, list(range(9)))
    shared: list[int] = []
    blocks.take(shared, blocks.match(list(range(9))))
    blocks.release(table)
    assert blocks.num_available == 1
    assert not blocks.grow([], 2 * BLOCK_SIZE)
    blocks.check_integrity([shared])


def test_num_needed_counts_cached_blocks_but_not_shared_ones():
    blocks = BlockManager(4, BLOCK_SIZE)
    table = fill(blocks, list(range(9)))
    matched = blocks.match(list(range(9)))
    assert blocks.num_needed(9, matched) == 1
    blocks.release(table)
    assert blocks.num_needed(9, matched) == 3


def test_forgotten_blocks_are_not_found_even_if_someone_holds_them():
    """After NaN logits the blocks are suspect; blocks that follow them must not be found either."""
    blocks = BlockManager(8, BLOCK_SIZE)
    tokens = list(range(13))
    table, other = fill(blocks, tokens), fill(blocks, tokens[:9])
    blocks.release(other, forget=True)
    assert blocks.match(tokens) == []
    blocks.check_integrity([table])
    again = fill(blocks, tokens)
    assert set(again).isdisjoint(table)
    blocks.release(table)
    assert blocks.match(tokens) == again[:3]
    blocks.check_integrity([again])


def test_without_prefix_caching_nothing_is_remembered():
    blocks = BlockManager(4, BLOCK_SIZE, enable_prefix_caching=False)
    table = fill(blocks, list(range(9)))
    blocks.check_integrity([table])
    blocks.release(table)
    assert blocks.match(list(range(9))) == []


def test_releasing_twice_is_caught():
    blocks = BlockManager(2, BLOCK_SIZE)
    table: list[int] = []
    blocks.grow(table, 1)
    copy = list(table)
    blocks.release(table)
    with pytest.raises(AssertionError, match="released twice"):
        blocks.release(copy)


def test_registering_out_of_order_is_caught():
    blocks = BlockManager(2, BLOCK_SIZE)
    blocks.release(fill(blocks, list(range(8))))
    table: list[int] = []
    blocks.grow(table, 8)
    with pytest.raises(AssertionError, match="block 1 is registered before"):
        blocks.register(table, 1, [0] * BLOCK_SIZE)


def test_audit_sees_a_lost_block():
    blocks = BlockManager(2, BLOCK_SIZE)
    blocks.grow([], 1)
    with pytest.raises(AssertionError, match="holder counts"):
        blocks.check_integrity([])


@pytest.mark.parametrize(
    ("num_blocks", "num_rounds"), [(AMPLE, 400), (12, 1500), (13, 1500), (30, 1500)]
)
def test_random_life_against_a_reference(num_blocks: int, num_rounds: int):
    """Random arrivals, growth and departures against two simple models.

    `written` is what the blocks hold: all tokens up to the block's end, as real keys depend on. A
    match must give blocks which hold exactly the beginning asked for. `known` has every beginning
    ever registered: while the pool is too large for any eviction, a match must find the longest.
    """
    rng = random.Random(num_blocks)
    blocks = BlockManager(num_blocks, BLOCK_SIZE)
    live: list[tuple[list[int], list[int]]] = []  # tokens, table
    written: dict[int, tuple[int, ...]] = {}
    known: set[tuple[int, ...]] = set()

    def write(tokens: list[int], table: list[int], num_done: int) -> None:
        for index in range(num_done, len(table)):
            written[table[index]] = tuple(tokens[: (index + 1) * BLOCK_SIZE])
        for index in range(num_done, len(tokens) // BLOCK_SIZE):
            end = (index + 1) * BLOCK_SIZE
            blocks.register(table, index, tokens[index * BLOCK_SIZE : end])
            known.add(tuple(tokens[:end]))

    num_refused = 0
    for _ in range(num_rounds):
        action = rng.random()
        if action < 0.4 and len(live) < 8:
            # Two tokens only, so that beginnings are often equal.
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 22))]
            matched = blocks.match(tokens)
            for index, block in enumerate(matched):
                assert written[block] == tuple(tokens[: (index + 1) * BLOCK_SIZE])
            if num_blocks == AMPLE:
                longest = 0
                while (
                    longest + BLOCK_SIZE < len(tokens)
                    and tuple(tokens[: longest + BLOCK_SIZE]) in known
                ):
                    longest += BLOCK_SIZE
                assert len(matched) * BLOCK_SIZE == longest
            needed = blocks.num_needed(len(tokens), matched)
            before = blocks.num_available
            if needed <= before:
                table: list[int] = []
                blocks.take(table, matched)
                assert blocks.grow(table, len(tokens))
                assert blocks.num_available == before - needed
                write(tokens, table, len(matched))
                live.append((tokens, table))
            else:
                num_refused += 1
        elif action < 0.7 and live:
            tokens, table = rng.choice(live)
            num_full = len(tokens) // BLOCK_SIZE
            tokens.append(rng.randrange(2))
            if blocks.grow(table, len(tokens)):
                write(tokens, table, num_full)
            else:
                tokens.pop()
                num_refused += 1
        elif live:
            _, table = live.pop(rng.randrange(len(live)))
            blocks.release(table)
        blocks.check_integrity(table for _, table in live)
        for tokens, table in live:
            assert len(table) == blocks.num_blocks_for(len(tokens))
            for index in range(len(tokens) // BLOCK_SIZE):
                assert written[table[index]] == tuple(tokens[: (index + 1) * BLOCK_SIZE])
        assert blocks.num_held == len({block for _, table in live for block in table})
    assert num_refused > 20 or num_blocks > 13
    for _, table in live:
        blocks.release(table)
    assert blocks.num_held == 0
    blocks.check_integrity([])

"""The block pool against a model too simple to be wrong: a list of who holds each block."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.schedule.block_pool import BlockPool, block_hash, extend_hashes, root_hash

NUM_BLOCKS = 6
BLOCK_SIZE = 2


def named(pool: BlockPool, tokens: list[int]) -> tuple[list[int], list[bytes]]:
    """Blocks that hold these tokens, cached; and their hashes."""
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, pool.block_size, len(tokens) // pool.block_size)
    blocks = pool.allocate(len(hashes))
    assert blocks is not None
    for block, name in zip(blocks, hashes, strict=True):
        pool.cache(block, name)
    return blocks, hashes


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share, fill and go; the model keeps for each block its holders and its name."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE, True)
        self.holders: list[list[int]] = [[] for _ in range(NUM_BLOCKS)]
        self.names: list[bytes | None] = [None] * NUM_BLOCKS  # contents that must not change while a block is held
        self.tables: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.next_id = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def arrive(self, tokens: list[int]) -> None:
        hashes: list[bytes] = []
        extend_hashes(hashes, tokens, BLOCK_SIZE, len(tokens) // BLOCK_SIZE)
        shared = self.pool.lookup(hashes)
        assert [self.names[block] for block in shared] == hashes[: len(shared)], "a block under another's name"
        num_new = self.pool.num_blocks_for(len(tokens)) - len(shared)
        free = [block for block in range(NUM_BLOCKS) if not self.holders[block] and block not in shared]
        table = self.pool.allocate(num_new, shared)
        assert (table is not None) == (num_new <= len(free))
        if table is None:
            return
        assert table[: len(shared)] == shared
        assert set(table[len(shared) :]) <= set(free), "a held block was given away"
        for block in table[len(shared) :]:
            self.names[block] = None
        for block in table:
            self.holders[block].append(self.next_id)
        for index, name in enumerate(hashes):
            self.pool.cache(table[index], name)
            self.names[table[index]] = name
        self.tables[self.next_id], self.tokens[self.next_id] = table, tokens
        self.next_id += 1

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.leave_as(data.draw(st.sampled_from(sorted(self.tables))))

    def leave_as(self, sequence: int) -> None:
        table = self.tables.pop(sequence)
        self.pool.free(table)
        for block in table:
            self.holders[block].remove(sequence)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """A sequence's contents are wrong: nobody who comes later finds them."""
        sequence = data.draw(st.sampled_from(sorted(self.tables)))
        self.pool.forget(self.tables[sequence])
        for block in self.tables[sequence]:
            self.names[block] = None
        del self.tokens[sequence]
        self.leave_as(sequence)

    @invariant()
    def free_is_what_nobody_holds(self) -> None:
        num_held = sum(1 for holders in self.holders if holders)
        assert self.pool.num_free == NUM_BLOCKS - num_held
        assert self.pool.usage == pytest.approx(num_held / NUM_BLOCKS)

    @invariant()
    def what_a_sequence_holds_is_found_as_far_as_it_is_not_forgotten(self) -> None:
        for sequence, tokens in self.tokens.items():
            table = self.tables.get(sequence, [])
            if table and all(self.names[block] for block in table[: len(tokens) // BLOCK_SIZE]):
                hashes: list[bytes] = []
                extend_hashes(hashes, tokens, BLOCK_SIZE, len(tokens) // BLOCK_SIZE)
                assert len(self.pool.lookup(hashes)) == len(hashes)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=30)


def test_a_hash_covers_everything_before_its_block():
    one: list[bytes] = []
    other: list[bytes] = []
    extend_hashes(one, [1, 2, 3, 4], 2, 2)
    extend_hashes(other, [9, 2, 3, 4], 2, 2)
    assert one[1] != other[1]
    assert one == [block_hash(b"", [1, 2]), block_hash(block_hash(b"", [1, 2]), [3, 4])]


def test_another_salt_makes_other_hashes_of_every_block_and_no_salt_is_none_of_them():
    def hashes(cache_salt: str | None) -> list[bytes]:
        found: list[bytes] = []
        extend_hashes(found, [1, 2, 3, 4], 2, 2, root_hash(cache_salt))
        return found

    assert hashes("tenant a") == hashes("tenant a")
    assert len({name for salt in ("tenant a", "tenant b", None) for name in hashes(salt)}) == 6


def test_forgotten_blocks_are_found_no_more_and_still_held_until_they_are_freed():
    pool = BlockPool(4, 2, True)
    blocks, hashes = named(pool, [1, 2, 3, 4])
    again = pool.allocate(0, pool.lookup(hashes))
    pool.forget(blocks)
    pool.forget(blocks)
    assert pool.lookup(hashes) == []
    assert again == blocks
    pool.free(blocks)
    assert pool.num_free == 2
    pool.free(blocks)
    assert sorted(pool.allocate(4) or ()) == [0, 1, 2, 3]


def test_hashes_are_extended_and_not_made_again():
    hashes = [b"known"]
    extend_hashes(hashes, [1, 2, 3, 4], 2, 2)
    assert hashes == [b"known", block_hash(b"known", [3, 4])]


def test_a_freed_block_is_found_until_it_is_given_away():
    pool = BlockPool(2, 2, True)
    blocks, hashes = named(pool, [1, 2])
    pool.free(blocks)
    assert pool.num_free == 2
    assert pool.lookup(hashes) == blocks
    assert pool.allocate(1) != blocks, "unused blocks go first"
    assert pool.lookup(hashes) == blocks
    assert pool.allocate(1) == blocks
    assert pool.lookup(hashes) == []


def test_the_least_recently_freed_block_is_given_away_first_and_a_tail_before_its_head():
    pool = BlockPool(4, 2, True)
    old, _ = named(pool, [1, 2, 3, 4])
    new, _ = named(pool, [5, 6, 7, 8])
    pool.free(old)
    pool.free(new)
    order = [block for _ in range(4) for block in pool.allocate(1) or ()]
    assert order == [old[1], old[0], new[1], new[0]]


def test_shared_free_blocks_do_not_count_twice():
    pool = BlockPool(2, 2, True)
    blocks, hashes = named(pool, [1, 2])
    pool.free(blocks)
    shared = pool.lookup(hashes)
    assert pool.allocate(2, shared) is None
    assert pool.num_free == 2, "a failed allocation changes nothing"
    assert pool.allocate(1, shared) is not None
    assert pool.num_free == 0


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(2, 2, False)
    blocks, hashes = named(pool, [1, 2, 3, 4])
    assert pool.lookup(hashes) == []
    pool.free(blocks)
    assert pool.lookup(hashes) == []
    assert pool.num_free == 2


def test_freeing_twice_is_an_error():
    pool = BlockPool(2, 2, True)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)

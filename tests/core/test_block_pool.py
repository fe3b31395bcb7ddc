"""BlockPool: a block is free if and only if nobody holds it, and free blocks are taken least recently used first."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from kvik.core.block_pool import BlockPool


def _take_all(pool: BlockPool) -> list[int]:
    return [pool.take() for _ in range(pool.num_free)]


def test_a_new_pool_hands_out_every_block_once() -> None:
    pool = BlockPool(5)
    assert pool.num_free == 5
    assert sorted(_take_all(pool)) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0


def test_a_block_without_reusable_content_is_taken_before_all_others() -> None:
    pool = BlockPool(4)
    taken = [pool.take() for _ in range(2)]
    pool.release(taken[1], reusable=False)
    assert pool.take() == taken[1]


def test_reusable_blocks_are_taken_last_and_in_the_order_in_which_they_became_free() -> None:
    pool = BlockPool(4)
    blocks = _take_all(pool)
    for block_id in (blocks[2], blocks[0], blocks[3]):
        pool.release(block_id, reusable=True)
    pool.release(blocks[1], reusable=False)
    assert _take_all(pool) == [blocks[1], blocks[2], blocks[0], blocks[3]]


def test_using_a_free_block_again_makes_it_the_most_recently_used() -> None:
    pool = BlockPool(2)
    first, second = _take_all(pool)
    pool.release(first, reusable=True)
    pool.release(second, reusable=True)
    pool.share(first)
    pool.release(first, reusable=True)
    assert _take_all(pool) == [second, first]


def test_a_shared_block_becomes_free_with_its_last_holder() -> None:
    pool = BlockPool(1)
    block_id = pool.take()
    pool.share(block_id)
    assert pool.ref_count(block_id) == 2
    pool.release(block_id, reusable=True)
    assert (pool.ref_count(block_id), pool.num_free) == (1, 0)
    pool.release(block_id, reusable=True)
    assert (pool.ref_count(block_id), pool.num_free) == (0, 1)


def test_a_shared_free_block_cannot_be_taken() -> None:
    pool = BlockPool(3)
    pool.share(0)
    assert pool.num_free == 2
    assert 0 not in _take_all(pool)


def test_releasing_more_often_than_taking_is_caught() -> None:
    pool = BlockPool(2)
    block_id = pool.take()
    pool.release(block_id, reusable=False)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(block_id, reusable=False)


def test_the_invariants_catch_a_held_block_in_the_free_list_and_a_lost_one() -> None:
    held_but_free, lost = BlockPool(2), BlockPool(2)
    held_but_free._refs[0] = 1
    del lost._free[1]
    for pool in (held_but_free, lost):
        with pytest.raises(AssertionError):
            pool.check_invariants()


@pytest.mark.parametrize("seed", range(5))
def test_reference_counts_are_those_of_a_plain_multiset_of_holders(seed: int) -> None:
    rng, pool, held = random.Random(seed), BlockPool(6), Counter[int]()
    for _ in range(500):
        action = rng.choice(("take", "share", "release"))
        if action == "take" and pool.num_free:
            block_id = pool.take()
            assert held[block_id] == 0, "a held block was handed out"
            held[block_id] += 1
        elif action == "share":
            block_id = rng.randrange(6)
            pool.share(block_id)
            held[block_id] += 1
        elif action == "release" and +held:
            block_id = rng.choice(list(+held))
            pool.release(block_id, reusable=rng.random() < 0.5)
            held[block_id] -= 1
        pool.check_invariants()
        assert [pool.ref_count(i) for i in range(6)] == [held[i] for i in range(6)]
        assert pool.num_free == sum(1 for i in range(6) if not held[i])

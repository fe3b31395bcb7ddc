"""The prefix cache: a hit is always the right content, of the same salt; the least useful block goes first."""

from __future__ import annotations

import random

import pytest
from core_harness import GuardedExecutor, ScriptedExecutor, World, make_config, make_request

from kvik.core.kv_manager import KVManager
from kvik.core.plan import Chunk, RowResult, StepPlan
from kvik.core.prefix_cache import CachedBlock, PrefixCache
from kvik.core.request import Sequence
from kvik.distributed.mock import mock_token


def _ids(blocks: list[CachedBlock]) -> list[int]:
    return [block.block_id for block in blocks]


def _sequence(tokens: list[int], salt: str = "") -> Sequence:
    request = make_request("r", tokens, cache_salt=salt)
    return Sequence(
        request=request, index=0, order=0, seed=0, max_total_tokens=10**6, stop_token_ids=frozenset(), token_ids=tokens
    )


def _computed(kv: KVManager, tokens: list[int], salt: str = "") -> Sequence:
    """A sequence that holds blocks for its tokens, all of them computed."""
    seq = _sequence(tokens, salt)
    cached = kv.match(seq)
    assert kv.admit(seq, cached, headroom=0)
    kv.commit(seq, len(tokens))
    return seq


def _first_block(executor: GuardedExecutor, row_seed: int) -> tuple[int, ...]:
    """Blocks that the sequence with this seed got when it joined."""
    for plan in executor.plans:
        for init in plan.joined:
            if init.seed == row_seed:
                return dict(plan.new_blocks)[init.row]
    raise AssertionError("never joined")


# Salts


@pytest.mark.parametrize("salt", ["", "a", "ключ", "\x00", "\ud800"], ids=ascii)
def test_any_string_is_a_salt(salt: str) -> None:
    world = World(make_config())
    for name in ("a", "b"):
        world.add(make_request(name, range(9), 2, cache_salt=salt))
        world.run()
    assert world.terminal("b").num_cached_tokens == 8


# The map


def test_a_block_is_found_after_its_prefix_and_with_its_tokens_only() -> None:
    cache = PrefixCache()
    prefix = cache.insert(3, "salt", (1, 2))
    assert cache.find("salt", (1, 2)) == (3, prefix)
    assert cache.find("", (1, 2)) is None
    assert cache.find(prefix, (1, 2)) is None
    assert cache.find("salt", (1, 3)) is None
    assert cache.find("salt", (1, 2, 3)) is None


def test_the_first_block_under_a_key_wins_and_stays_findable() -> None:
    cache = PrefixCache()
    first = cache.insert(1, "", (1,))
    assert cache.insert(2, "", (1,)) == first
    assert (cache.find("", (1,)), 2 in cache, len(cache)) == ((1, first), False, 1)
    cache.evict(2)
    assert cache.find("", (1,)) == (1, first)
    cache.evict(1)
    cache.evict(1)
    assert (cache.find("", (1,)), len(cache)) == (None, 0)


def test_the_id_of_a_prefix_is_never_used_again() -> None:
    cache = PrefixCache()
    seen = set()
    for _ in range(5):
        seen.add(cache.insert(1, "", (1,)))
        cache.evict(1)
    assert len(seen) == 5


def test_the_invariants_catch_maps_that_disagree() -> None:
    cache = PrefixCache()
    cache.insert(1, "", (1,))
    cache._keys[2] = ("", (2,))
    with pytest.raises(AssertionError):
        cache.check_invariants()


# Matching


@pytest.mark.parametrize("size", [1, 2, 4, 16])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_known_prompt_hits_all_full_blocks_but_always_computes_its_last_token(
    size: int, blocks: int, extra: int
) -> None:
    length = blocks * size + extra
    if length < 1:
        pytest.skip("no tokens")
    kv = KVManager(16, size, enable_prefix_caching=True)
    tokens = list(range(length))
    _computed(kv, tokens)
    assert len(kv.match(_sequence(tokens))) == (length - 1) // size
    assert len(kv.match(_sequence([*tokens, 99]))) == length // size


def test_a_prefix_matches_up_to_the_first_block_that_differs() -> None:
    kv = KVManager(16, 2, enable_prefix_caching=True)
    seq = _computed(kv, [1, 2, 3, 4, 5, 6, 7])
    assert _ids(kv.match(_sequence([1, 2, 3, 4, 9, 6, 7]))) == seq.block_ids[:2]
    assert kv.match(_sequence([9, 2, 3, 4, 5, 6, 7])) == []


def test_a_sequence_that_waits_for_room_is_not_looked_up_from_its_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = KVManager(12, 2, enable_prefix_caching=True)
    tokens = list(range(12))
    owner = _computed(kv, tokens[:8])
    others = [_computed(kv, [100 + i, 0]) for i in range(6)]
    waiting = _sequence([*tokens, 12])
    calls = []
    monkeypatch.setattr(kv.cache, "find", lambda *key: calls.append(key) or PrefixCache.find(kv.cache, *key))
    for _ in range(10):
        assert not kv.admit(waiting, kv.match(waiting), headroom=0)
    assert len(calls) == 4 + 10
    kv.grow(owner, 12)
    owner.token_ids = tokens
    kv.commit(owner, 12)
    assert _ids(kv.match(waiting)) == owner.block_ids  # what was computed meanwhile counts
    kv.free(owner.block_ids)
    kv.check_invariants(others, [kv._take()])
    assert _ids(kv.match(waiting)) == owner.block_ids[:5]  # and what was evicted does not


def test_nothing_is_ever_found_with_caching_off() -> None:
    world = World(make_config(enable_prefix_caching=False))
    for name in ("a", "b"):
        world.add(make_request(name, range(20), 2, n=2))
        world.run()
        assert world.terminal(name).num_cached_tokens == world.terminal(name, 1).num_cached_tokens == 0
    assert len(world.scheduler.kv.cache) == 0


def test_different_salts_share_nothing_and_equal_salts_everything() -> None:
    kv = KVManager(32, 2, enable_prefix_caching=True)
    tokens = [1, 2, 3, 4, 5]
    held = {salt: _computed(kv, list(tokens), salt) for salt in ("", "a", "b")}
    blocks = [block_id for seq in held.values() for block_id in seq.block_ids]
    assert len(set(blocks)) == len(blocks)
    for salt, seq in held.items():
        assert _ids(kv.match(_sequence(tokens, salt))) == seq.block_ids[:2]
    assert kv.match(_sequence(tokens, "c")) == []


def test_the_output_of_a_finished_request_is_reused_by_the_next_turn_of_its_conversation() -> None:
    world = World(make_config())
    world.add(make_request("turn 1", range(6), 10))
    world.run()
    history = [*range(6), *world.tokens("turn 1")]  # KV exists for all but the last token
    world.add(make_request("turn 2", [*history, 7], 2))
    world.run()
    assert world.terminal("turn 2").num_cached_tokens == 12


# Collisions


class _Token(int):
    """A token id whose hash is that of all others: the hash table has nothing but equality to go by."""

    def __hash__(self) -> int:
        return 7


@pytest.mark.parametrize("seed", range(4))
def test_with_colliding_hashes_every_output_is_still_right(seed: int) -> None:
    rng = random.Random(seed)
    world = World(make_config(block_size=2, num_blocks=24))
    for i in range(60):
        prompt = [_Token(token) for token in rng.choices(range(3), k=rng.randint(1, 12))]
        world.add(make_request(f"r{i}", prompt, rng.randint(1, 6)))
        world.step()
    world.run()


def test_a_block_is_not_found_below_an_evicted_prefix_that_was_cached_anew() -> None:
    kv = KVManager(16, 2, enable_prefix_caching=True)
    first = _computed(kv, [1, 1, 3, 3])
    kv.cache.evict(first.block_ids[0])
    second = _computed(kv, [1, 1])
    assert _ids(kv.match(_sequence([1, 1, 3, 3, 5]))) == second.block_ids


# Eviction


def test_a_prefix_is_evicted_from_its_tail() -> None:
    kv = KVManager(4, 2, enable_prefix_caching=True)
    seq = _computed(kv, [1, 2, 3, 4, 5, 6, 7, 8])
    kv.free(seq.block_ids)
    for left in (3, 2, 1, 0):
        kv.pool.share(kv._take())  # keep it
        assert _ids(kv.match(_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]))) == seq.block_ids[:left]


def test_the_prefix_that_was_used_longest_ago_is_evicted_first() -> None:
    kv = KVManager(3, 2, enable_prefix_caching=True)
    a, b, c = (_computed(kv, [i, i]) for i in range(3))
    for seq in (b, a, c):
        kv.free(seq.block_ids)
    b_again = _sequence([1, 1, 9])
    cached = kv.match(b_again)
    kv.pool.share(cached[0].block_id)
    kv.free([cached[0].block_id])  # b is now the most recently used
    found = []
    for _ in range(3):
        kv._take()
        found.append([i for i in range(3) if kv.match(_sequence([i, i, 9]))])
    assert found == [[1, 2], [1], []]


def test_empty_blocks_are_taken_before_any_cached_one() -> None:
    world = World(make_config(num_blocks=8, max_model_len=24))
    world.add(make_request("a", range(9), 1))
    world.run()
    world.add(make_request("b", range(100, 120), 1))  # five blocks of the six that hold nothing
    world.run()
    world.add(make_request("c", range(9), 1))
    world.run()
    assert world.terminal("c").num_cached_tokens == 8


def test_the_partial_last_block_of_a_finished_request_is_taken_before_any_cached_one() -> None:
    """Three prompts of two full blocks each and one block for their last tokens in turn fill a pool of seven."""
    world = World(make_config(num_blocks=7, max_model_len=24))
    for _ in range(2):
        for i in range(3):
            world.add(make_request(f"r{i}", [i] * 9, 1))
            world.run()
    assert [world.terminal(f"r{i}").num_cached_tokens for i in range(3)] == [8, 8, 8]


def test_churn_evicts_the_old_keeps_the_new_and_never_returns_the_wrong_content() -> None:
    world = World(make_config(num_blocks=10, max_model_len=24))
    for i in range(40):
        world.add(make_request(f"r{i}", [i] * 12, 1))
        world.run()
        assert len(world.scheduler.kv.cache) <= 10
    for name, prompt, cached in (("new", [39] * 12, 8), ("old", [0] * 12, 0)):
        world.add(make_request(name, prompt, 1))
        world.run()
        assert world.terminal(name).num_cached_tokens == cached


def test_a_cached_block_in_use_is_never_evicted() -> None:
    kv = KVManager(4, 2, enable_prefix_caching=True)
    seq = _computed(kv, [1, 2, 3])
    while kv.num_free:
        kv._take()
    assert _ids(kv.match(_sequence([1, 2, 3]))) == seq.block_ids[:1]


# When a block becomes findable


def test_a_block_is_findable_only_after_the_step_that_computes_it_has_completed() -> None:
    world = World(make_config(run_ahead=1), lag=True)
    world.engine.add(make_request("a", range(9), 8, seed=1))
    world.engine._submit()
    world.engine.add(make_request("b", range(9), 8, seed=2))
    world.engine._submit()
    plan = world.executor.plans[-1]
    assert [init.seed for init in plan.joined] == [2]
    assert plan.chunks[-1].start == 0, "the blocks of a step in flight were found"
    world.engine._collect()
    world.engine.add(make_request("c", range(9), 8, seed=3))
    world.engine._submit()
    assert world.executor.plans[-1].chunks[-1].start == 8


def test_twins_in_one_step_compute_in_blocks_of_their_own_and_one_of_them_is_kept() -> None:
    world = World(make_config())
    for i in (1, 2):
        world.add(make_request(f"twin {i}", range(9), 3, seed=i))
    world.step()
    first, second = (_first_block(world.executor, seed) for seed in (1, 2))
    assert not set(first) & set(second)
    world.add(make_request("third", range(9), 3, seed=3))
    world.step()
    assert _first_block(world.executor, 3)[:2] == first[:2]
    world.run()


def test_the_chunks_of_a_long_prompt_become_findable_one_by_one() -> None:
    world = World(make_config(max_num_batched_tokens=8, max_num_seqs=2))
    world.add(make_request("long", range(30), 2))
    found = []
    for _ in range(4):
        world.step()
        found.append(len(world.scheduler.kv.match(_sequence(list(range(30))))))
    assert found == [2, 4, 6, 7]


def test_a_partial_block_is_never_shared() -> None:
    world = World(make_config())
    world.add(make_request("a", range(6), 8, seed=1))
    world.step()
    world.add(make_request("b", range(6), 8, seed=2))
    world.step()
    shared = set(_first_block(world.executor, 1)) & set(_first_block(world.executor, 2))
    assert shared == {_first_block(world.executor, 1)[0]}


def test_a_surplus_token_never_reaches_the_cache() -> None:
    """The stop token fills position 7; the step in flight computes it, and samples a surplus token after it."""
    prompt = list(range(5))
    tokens = list(prompt)
    while len(tokens) < 12:
        tokens.append(mock_token(tokens, 0, 50))
    world = World(make_config(run_ahead=1), lag=True)
    world.add(make_request("a", prompt, 20, stop_token_ids=(tokens[7],)))
    world.run()
    assert world.tokens("a") == tuple(tokens[5:8])
    kv = world.scheduler.kv
    assert len(kv.match(_sequence(tokens))) == 1, "only the first block holds confirmed tokens of a completed step"


def test_blocks_of_a_row_that_failed_are_not_findable() -> None:
    def fail(plan: StepPlan, chunk: Chunk, row: RowResult) -> RowResult:
        return RowResult(row.row, error="the logits are not finite")

    world = World(make_config(), executor=ScriptedExecutor(4, fail))
    world.engine.add(make_request("a", range(9), 4))
    world.engine.step()
    assert len(world.scheduler.kv.cache) == 0


# KVManager accounting


def test_admit_changes_nothing_unless_everything_and_the_headroom_fit() -> None:
    kv = KVManager(4, 2, enable_prefix_caching=True)
    seq = _sequence([1, 2, 3, 4, 5])
    assert not kv.admit(seq, [], headroom=2)
    assert (seq.block_ids, kv.num_used) == ([], 0)
    assert kv.admit(seq, [], headroom=1)
    assert (len(seq.block_ids), kv.num_used) == (3, 3)


def test_a_cached_block_that_nobody_uses_counts_as_needed_when_it_is_revived() -> None:
    kv = KVManager(3, 2, enable_prefix_caching=True)
    old = _computed(kv, [1, 2, 3, 4])
    kv.free(old.block_ids)
    seq = _sequence([1, 2, 3, 4, 5])
    cached = kv.match(seq)
    assert len(cached) == 2
    assert not kv.admit(seq, cached, headroom=1), "two revived and one new block leave nothing free"
    assert kv.admit(seq, cached, headroom=0)
    kv.check_invariants([seq])


def test_a_cached_block_that_is_in_use_costs_nothing_to_share() -> None:
    kv = KVManager(3, 2, enable_prefix_caching=True)
    first = _computed(kv, [1, 2, 3])
    second = _sequence([1, 2, 4])
    assert kv.admit(second, kv.match(second), headroom=0)
    assert kv.num_used == 3
    kv.check_invariants([first, second])


def test_grow_gives_exactly_the_missing_blocks_or_none() -> None:
    kv = KVManager(3, 2, enable_prefix_caching=True)
    seq = _computed(kv, [1, 2])
    assert kv.grow(seq, 2) == ()
    new = kv.grow(seq, 5)
    assert new is not None and len(new) == 2 and seq.block_ids[1:] == list(new)
    assert kv.grow(seq, 7) is None
    assert len(seq.block_ids) == 3


def test_the_invariants_catch_a_leaked_block_a_double_owner_and_an_uncached_shared_block() -> None:
    def leak(kv: KVManager, seq: Sequence) -> list[Sequence]:
        return []

    def double(kv: KVManager, seq: Sequence) -> list[Sequence]:
        return [seq, seq]

    def twice(kv: KVManager, seq: Sequence) -> list[Sequence]:
        kv.pool.share(seq.block_ids[0])
        seq.block_ids.append(seq.block_ids[0])
        return [seq]

    def private(kv: KVManager, seq: Sequence) -> list[Sequence]:
        other = _sequence([5])
        other.block_ids = [seq.block_ids[-1]]
        kv.pool.share(seq.block_ids[-1])
        return [seq, other]

    for spoil in (leak, double, twice, private):
        kv = KVManager(8, 2, enable_prefix_caching=True)
        seq = _computed(kv, [1, 2, 3])
        kv.check_invariants([seq])
        with pytest.raises(AssertionError):
            kv.check_invariants(spoil(kv, seq))

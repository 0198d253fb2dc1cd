"""Eviction hooks: who is asked, when, and what an operation that still fails leaves behind."""

from __future__ import annotations

import pytest
import torch

from torch_winnow.kvcache import BlockPool, BlockPoolExhausted, PagedKVCache

BLOCK = 4


def make_pool(blocks: int) -> BlockPool:
    return BlockPool(
        blocks, num_layers=1, num_kv_heads=1, head_dim=1, block_size=BLOCK, dtype=torch.float32
    )


def extend(cache: PagedKVCache, blocks: float, number: float = 1.0) -> None:
    tokens = torch.full((cache.batch_size, 1, int(blocks * BLOCK), 1), number)
    cache.append(0, tokens, -tokens)


def filled(pool: BlockPool, blocks: float, rows: int = 1, number: float = 1.0) -> PagedKVCache:
    cache = PagedKVCache(pool, rows)
    extend(cache, blocks, number)
    return cache


def holds(cache: PagedKVCache, *numbers: float) -> None:
    """Row 0 holds these numbers, a block each."""
    blocks = cache.block_table[0].long()
    keys = cache.pool.key_pages[0, blocks, 0, :, 0].flatten()[: int(cache.seq_lens[0])]
    assert torch.equal(keys, torch.tensor(numbers).repeat_interleave(BLOCK)[: len(keys)])


def test_a_hook_hears_what_is_missing_and_makes_room():
    pool = make_pool(6)
    idle = filled(pool, 2, rows=2)
    active = PagedKVCache(pool, 1)
    asked = []

    def hook(missing: int) -> None:
        asked.append(missing)
        idle.free([0])

    pool.add_eviction_hook(hook)
    extend(active, 2, 3.0)
    assert asked == []
    extend(active, 2, 5.0)
    assert asked == [2]
    assert idle.seq_lens.tolist() == [0, 8]
    assert active.seq_lens.tolist() == [16]
    holds(active, 3.0, 3.0, 5.0, 5.0)
    pool.remove_eviction_hook(hook)
    with pytest.raises(BlockPoolExhausted):
        extend(active, 1)
    assert asked == [2]


def test_hooks_take_turns_until_there_is_enough():
    pool = make_pool(4)
    victims = [filled(pool, 1) for _ in range(4)]
    asked = []
    for name, victim in enumerate(victims):

        def hook(missing: int, name: int = name, victim: PagedKVCache = victim) -> None:
            asked.append((name, missing))
            if name != 1:
                victim.truncate_([0])

        pool.add_eviction_hook(hook)
    active = PagedKVCache(pool, 1)
    extend(active, 2)
    assert asked == [(0, 2), (1, 1), (2, 1)]
    assert [int(victim.seq_lens) for victim in victims] == [0, 4, 0, 4]


def test_too_little_is_exhaustion_and_changes_nothing():
    pool = make_pool(3)
    victim, active = filled(pool, 1), filled(pool, 1.5, number=2.0)
    pool.add_eviction_hook(lambda missing: victim.free([0]) if victim.seq_lens[0] else None)
    pool.add_eviction_hook(lambda missing: None)
    table = active.block_table.tolist()
    with pytest.raises(BlockPoolExhausted, match="2 blocks needed, 1 free of 3") as error:
        extend(active, 2)
    assert (error.value.needed, error.value.free) == (2, 1)
    assert (active.seq_lens.tolist(), active.block_table.tolist()) == ([6], table)
    holds(active, 2.0, 2.0)
    assert pool.num_free_blocks == 1  # what the hook gave up stays given up


def test_a_hook_that_raises_ends_the_operation():
    pool = make_pool(1)
    active = filled(pool, 1)

    def hook(missing: int) -> None:
        raise KeyError("nobody to evict")

    pool.add_eviction_hook(hook)
    with pytest.raises(KeyError, match="nobody to evict"):
        extend(active, 1)
    assert active.seq_lens.tolist() == [4]
    pool.remove_eviction_hook(hook)
    # The pool works on, for this cache and for others, whichever thread asks.
    active.truncate_([0])
    extend(active, 1, 2.0)
    holds(active, 2.0)


def test_the_cache_that_waits_cannot_be_changed():
    pool = make_pool(2)
    active = filled(pool, 1, rows=2)
    one = torch.ones(2, 1, 1, 1)
    for change in (
        lambda: active.free([0]),
        lambda: active.truncate_([0, 0]),
        lambda: active.permute_([0, 0]),
        lambda: active.append(0, one, one),
        lambda: active.write(0, one, one, torch.zeros(2, 1, dtype=torch.int64)),
        lambda: active.match_prefix([1]),
    ):
        refusals = []

        def hook(missing: int, change=change, refusals=refusals) -> None:
            with pytest.raises(RuntimeError, match="may not change the cache that waits"):
                change()
            refusals.append(missing)

        pool.add_eviction_hook(hook)
        with pytest.raises(BlockPoolExhausted):
            extend(active, 1)
        pool.remove_eviction_hook(hook)
        assert refusals == [2]
        assert active.seq_lens.tolist() == [4, 4]
    active.free([0])  # afterwards it can


def test_a_hook_that_runs_short_itself_asks_nobody():
    pool = make_pool(2)
    first, second = filled(pool, 1), filled(pool, 1)
    asked = []

    def hook(missing: int) -> None:
        asked.append(missing)
        with pytest.raises(BlockPoolExhausted):
            extend(second, 1)
        second.free([0])
        extend(PagedKVCache(pool, 1), 1)  # and may use the pool: this one is dropped at once

    pool.add_eviction_hook(hook)
    extend(first, 1)
    assert asked == [1]
    assert (first.seq_lens.tolist(), second.seq_lens.tolist()) == ([8], [0])


def test_a_hook_may_grow_the_pool_and_drop_caches():
    pool = make_pool(1)
    active = filled(pool, 1, number=3.0)
    grown = pool.grow
    pool.add_eviction_hook(lambda missing: grown(pool.num_blocks + missing))
    extend(active, 2, 4.0)
    assert pool.num_blocks == 3
    holds(active, 3.0, 4.0, 4.0)

    pool = make_pool(2)
    idle = [filled(pool, 2)]
    pool.add_eviction_hook(lambda missing: idle.clear())
    extend(PagedKVCache(pool, 1), 2)
    assert idle == []


def test_copies_of_shared_blocks_ask_too():
    pool = make_pool(3)
    victim, parent = filled(pool, 1), filled(pool, 2, number=2.0)
    child = parent.fork([0])
    pool.add_eviction_hook(lambda missing: victim.free([0]))
    ones = torch.ones(1, 1, 4, 1)
    child.write(0, ones, ones, torch.arange(4)[None])
    holds(child, 1.0, 2.0)
    holds(parent, 2.0, 2.0)
    # A hook that makes the block shared with one more row: the operation starts anew.
    pool = make_pool(3)
    victim, parent = filled(pool, 2), filled(pool, 1, number=2.0)
    child, more = parent.fork([0]), []

    def hook(missing: int) -> None:
        victim.free([0])
        more.append(child.fork([0]))

    pool.add_eviction_hook(hook)
    child.write(0, ones, ones, torch.arange(4)[None])
    holds(child, 1.0)
    holds(more[0], 2.0)


def test_prefixes_go_before_hooks_are_asked():
    pool = make_pool(2)
    cache = filled(pool, 1)
    cache.register_prefix(range(4))
    cache.free([0])
    asked = []
    pool.add_eviction_hook(asked.append)
    extend(cache, 2)
    assert asked == []


def test_refusals():
    pool = make_pool(1)
    with pytest.raises(ValueError, match="hook: expected a function of a number of blocks, got 3"):
        pool.add_eviction_hook(3)
    with pytest.raises(ValueError, match="hook: expected one that was added"):
        pool.remove_eviction_hook(print)

"""What sets of rows retain and what rows add, against the block tables themselves."""

from __future__ import annotations

import doctest
import random
from itertools import chain, combinations
from pathlib import Path

import pytest
import torch

from torch_winnow.kvcache import BlockPool, PagedKVCache

PAGE = Path(__file__).parents[1] / "docs/kvcache/tree_search.md"


def grow(cache: PagedKVCache, lengths: list[int]) -> None:
    states = torch.zeros(cache.batch_size, 1, max(lengths), 1)
    cache.append(0, states, states, lengths=lengths)


def tree(seed: int) -> PagedKVCache:
    """Leaves of a random tree; some rows are freed, some end where their parent does."""
    dice = random.Random(seed)
    pool = BlockPool(
        200, num_layers=1, num_kv_heads=1, head_dim=1, block_size=4, dtype=torch.float32
    )
    cache = PagedKVCache(pool, 1)
    for _ in range(4):
        grow(cache, [dice.randrange(14) for _ in range(cache.batch_size)])
        count = dice.randrange(1, 8)
        cache = cache.fork([dice.randrange(cache.batch_size) for _ in range(count)])
    if dice.random() < 0.5:
        cache.free([0])
    return cache


def held(cache: PagedKVCache) -> list[set[int]]:
    return [{block for block in row if block >= 0} for row in cache.block_table.tolist()]


def subsets(count: int):
    return chain.from_iterable(combinations(range(count), n) for n in range(count + 1))


@pytest.mark.parametrize("seed", range(12))
def test_counts_of_every_set_of_rows(seed):
    cache = tree(seed)
    blocks = held(cache)
    for rows in subsets(cache.batch_size):
        union = set().union(*(blocks[row] for row in rows))
        assert cache.retained_blocks(rows) == len(union)
        assert cache.marginal_blocks(rows) == [len(own - union) for own in blocks]


@pytest.mark.parametrize("seed", range(12))
def test_a_row_gives_back_what_it_says(seed):
    for row in range(tree(seed).batch_size):
        cache = tree(seed)
        other = cache.fork([cache.batch_size - 1])  # blocks that another cache shares stay
        if not cache.seq_lens[row]:
            assert cache.marginal_blocks()[row] == 0
            continue
        expected, before = cache.marginal_blocks()[row], cache.pool.num_free_blocks
        cache.free([row])
        assert cache.pool.num_free_blocks - before == expected
        del other


def test_registered_blocks_come_back_when_they_are_needed():
    pool = BlockPool(3, num_layers=1, num_kv_heads=1, head_dim=1, block_size=4, dtype=torch.float32)
    cache = PagedKVCache(pool, 1)
    grow(cache, [12])
    cache.register_prefix(range(8))
    assert cache.marginal_blocks() == [3]
    cache.free([0])
    assert (pool.num_free_blocks, pool.num_evictable_blocks) == (1, 2)
    grow(cache, [12])


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_of_the_page(seed):
    """Greedy: never better than all subsets, and exact where blocks are free or beyond price."""
    names: dict[str, object] = {}
    for example in doctest.DocTestParser().get_examples(PAGE.read_text()):
        if example.source.startswith("def survivors"):
            exec(example.source, names)
    survivors = names["survivors"]
    cache, dice = tree(seed), random.Random(seed)
    blocks = held(cache)
    rewards = [dice.random() for _ in range(cache.batch_size)]
    best = max(range(cache.batch_size), key=rewards.__getitem__)

    def worth(rows, price):
        union = set().union(*(blocks[row] for row in rows))
        return sum(rewards[row] for row in rows) - price * len(union)

    assert survivors(cache, rewards, 0.0) == list(range(cache.batch_size))
    for price in (0.02, 0.1, 0.3):
        kept = survivors(cache, rewards, price)
        assert best in kept
        choices = [rows for rows in subsets(cache.batch_size) if best in rows]
        assert worth(kept, price) <= max(worth(rows, price) for rows in choices) + 1e-9
        assert worth(kept, price) >= worth([best], price) - 1e-9
        # Nobody else gains alone.
        for row in set(range(cache.batch_size)) - set(kept):
            assert worth([*kept, row], price) <= worth(kept, price) + 1e-9


def test_refusals():
    cache = tree(0)
    beyond = cache.batch_size
    for name, call in (("rows", cache.retained_blocks), ("kept", cache.marginal_blocks)):
        message = f"{name}: expected 0 <= row < {beyond}, got {beyond}"
        with pytest.raises(ValueError, match=message):
            call([beyond])
        with pytest.raises(ValueError, match=f"{name}: expected a list of integers"):
            call(1)
    assert cache.retained_blocks([]) == 0
    assert PagedKVCache(cache.pool, 0).marginal_blocks() == []

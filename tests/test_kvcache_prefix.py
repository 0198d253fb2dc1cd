"""Prefix matching: what is found is right, and what nobody holds gives way."""

from __future__ import annotations

import random

import pytest
import torch

from torch_winnow.kvcache import BlockPool, BlockPoolExhausted, PagedKVCache

LAYERS, BLOCK = 2, 4


def make_pool(blocks):
    return BlockPool(
        blocks, num_layers=LAYERS, num_kv_heads=1, head_dim=1, block_size=BLOCK, dtype=torch.float64
    )


def states(prefix, tokens):
    """A key is a number that all tokens up to its own decide, as in a causal model."""
    out = []
    for token in tokens:
        prefix = (*prefix, token)
        out.append(float(hash(prefix) % 2**40))
    return torch.tensor(out, dtype=torch.float64).view(1, 1, -1, 1)


def extend(cache, tokens, more):
    """A step of a single row, in every layer."""
    keys = states(tuple(tokens), more)
    for layer in range(LAYERS):
        cache.append(layer, keys + layer, -keys)
    return tokens + more


def holds(cache, row, tokens):
    pool = cache.pool
    where = torch.arange(len(tokens))
    blocks = cache.block_table[row, where // BLOCK].long()
    expected = states((), tokens).flatten()
    for layer in range(LAYERS):
        assert torch.equal(pool.key_pages[layer, blocks, 0, where % BLOCK, 0], expected + layer)
        assert torch.equal(pool.value_pages[layer, blocks, 0, where % BLOCK, 0], -expected)


def test_a_prompt_is_found_again():
    pool = make_pool(16)
    first = PagedKVCache(pool, 1)
    tokens = extend(first, [], list(range(10)))
    assert first.register_prefix(torch.tensor(tokens)) == 8
    del first
    assert (pool.num_free_blocks, pool.num_evictable_blocks) == (14, 2)

    cache = PagedKVCache(pool, 2)
    assert cache.match_prefix([0, 1, 2, 3, 4, 5, 6, 99], row=1) == 4
    assert cache.match_prefix(tokens) == 8
    assert cache.seq_lens.tolist() == [8, 4]
    assert cache.block_table.shape == (2, 2)
    holds(cache, 0, tokens[:8])
    holds(cache, 1, tokens[:4])
    assert pool.num_evictable_blocks == 0
    assert PagedKVCache(pool, 1).match_prefix([5]) == 0
    # The same block behind another prefix is another block.
    assert PagedKVCache(pool, 1).match_prefix([4, 5, 6, 7]) == 0


def test_a_row_with_the_same_tokens_continues_the_chain():
    """Blocks that were computed twice are registered once, and the second row's go on from them."""
    pool = make_pool(16)
    one, two = PagedKVCache(pool, 1), PagedKVCache(pool, 1)
    short, long = extend(one, [], list(range(8))), extend(two, [], list(range(12)))
    one.register_prefix(short)
    two.register_prefix(long)
    found = PagedKVCache(pool, 1)
    assert found.match_prefix(long) == 12
    assert found.block_table.tolist() == [
        one.block_table[0].tolist() + two.block_table[0, 2:].tolist()
    ]
    holds(found, 0, long)


def test_the_least_recently_used_prefix_gives_way():
    pool = make_pool(4)
    for start in (0, 100, 200):
        cache = PagedKVCache(pool, 1)
        cache.register_prefix(extend(cache, [], list(range(start, start + 4))))
        del cache
    PagedKVCache(pool, 1).match_prefix([0, 1, 2, 3])  # used again: 100 is the oldest now
    cache = PagedKVCache(pool, 1)
    extend(cache, [], [7] * 8)
    assert (pool.num_free_blocks, pool.num_evictable_blocks) == (0, 2)
    other = PagedKVCache(pool, 1)
    assert other.match_prefix(range(100, 104)) == 0
    assert other.match_prefix(range(4)) == 4
    # One block is held, one may go: two are too many, and nothing changes.
    with pytest.raises(BlockPoolExhausted, match="2 blocks needed, 1 free of 4") as error:
        cache.append(0, *[torch.zeros(1, 1, 8, 1).double()] * 2)
    assert error.value.free == 1
    assert PagedKVCache(pool, 1).match_prefix(range(200, 204)) == 4


def test_the_end_of_a_chain_goes_first():
    pool = make_pool(3)
    cache = PagedKVCache(pool, 1)
    tokens = extend(cache, [], list(range(12)))
    cache.register_prefix(tokens)
    del cache
    cache = PagedKVCache(pool, 1)
    extend(cache, [], [50])
    assert PagedKVCache(pool, 1).match_prefix(tokens) == 8


def test_a_written_block_is_forgotten_without_a_copy():
    """The index's share costs no block: K owners among rows still need K - 1 copies."""
    pool = make_pool(2)
    cache = PagedKVCache(pool, 1)
    tokens = extend(cache, [], list(range(8)))
    cache.register_prefix(tokens)
    cache.truncate_([6])
    assert pool.num_evictable_blocks == 0
    extend(cache, tokens[:6], [60, 70])  # no free block is left, and none is needed
    holds(cache, 0, [*tokens[:6], 60, 70])
    assert cache.register_prefix([*tokens[:6], 60, 70]) == 8
    cache.write(
        0, *[torch.zeros(1, 1, 1, 1).double()] * 2, torch.tensor([[1]])
    )  # the first: what follows it is not findable either
    cache.free([0])
    assert pool.num_free_blocks == 2


def test_a_block_that_rows_share_is_copied_and_stays_findable():
    pool = make_pool(4)
    cache = PagedKVCache(pool, 1)
    tokens = extend(cache, [], list(range(4)))
    cache.register_prefix(tokens)
    twin = cache.fork([0])
    twin.truncate_([2])
    extend(twin, tokens[:2], [9, 9, 9])
    holds(twin, 0, [0, 1, 9, 9, 9])
    holds(cache, 0, tokens)
    assert PagedKVCache(pool, 1).match_prefix(tokens) == 4


def test_refusals_change_nothing():
    pool = make_pool(4)
    cache = PagedKVCache(pool, 2)
    with pytest.raises(
        ValueError, match="token_ids: expected at most 0 tokens, as many as layer 0"
    ):
        cache.register_prefix([1])
    keys = torch.zeros(2, 1, 4, 1).double()
    cache.append(0, keys, keys)
    with pytest.raises(ValueError, match="as many as layer 1 has stored in row 1, got 4"):
        cache.register_prefix([1, 2, 3, 4], row=1)
    cache.append(1, keys, keys)
    for call in (cache.register_prefix, cache.match_prefix):
        with pytest.raises(ValueError, match="row: expected 0 <= row < 2, got 2"):
            call([1], row=2)
        with pytest.raises(ValueError, match="token_ids: expected a list of integers"):
            call(3)
        with pytest.raises(ValueError, match=r"token_ids\[0\]: expected an integer, got 'a'"):
            call("abcd")
    with pytest.raises(ValueError, match="row: expected one without tokens, got row 0"):
        cache.match_prefix([1, 2, 3, 4])
    assert cache.register_prefix([1, 2, 3, 4]) == 4
    assert cache.register_prefix([1, 2, 3, 4]) == 4
    with pytest.raises(ValueError, match="block 0 of row 0 is registered with other tokens"):
        cache.register_prefix([5, 6, 7, 8])
    assert cache.register_prefix([]) == 0
    assert PagedKVCache(pool, 1).match_prefix([]) == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_histories(seed):
    """Prompts from a small alphabet, so that many collide; every row always holds its own keys."""
    dice = random.Random(seed)
    pool = make_pool(20)
    rows: list[tuple[PagedKVCache, list[int]]] = []
    matched, refusals = 0, []
    for _ in range(200):
        move = dice.choice(["new", "new", "extend", "extend", "drop", "fork", "cut", "register"])
        cache = held = None
        if move == "new":
            prompt = [dice.randrange(2) for _ in range(dice.randrange(14))]
            cache = PagedKVCache(pool, 1)
            count = cache.match_prefix(prompt)
            matched += count
            rows.append((cache, prompt[:count]))
        elif rows:
            at = dice.randrange(len(rows))
            cache, tokens = rows.pop(at)
            if move == "extend":
                more = [dice.randrange(2) for _ in range(dice.randrange(1, 7))]
                available = pool.num_free_blocks + pool.num_evictable_blocks
                try:
                    tokens = extend(cache, tokens, more)
                except BlockPoolExhausted as error:
                    refusals.append((available, error))
            elif move == "fork":
                rows.append((cache.fork([0]), list(tokens)))
            elif move == "cut":
                tokens = tokens[: dice.randrange(len(tokens) + 1)]
                cache.truncate_([len(tokens)])
            elif move == "register":
                cache.register_prefix(tokens)
            if move != "drop":
                rows.append((cache, tokens))
        cache = None
        for held, tokens in rows:
            assert held.seq_lens.tolist() == [len(tokens)]
            holds(held, 0, tokens)
        used = {b for held, _ in rows for b in held.block_table.flatten().tolist() if b >= 0}
        assert pool.num_free_blocks + pool.num_evictable_blocks + len(used) == pool.num_blocks
    assert matched > 0
    assert refusals
    assert all(error.free == available < error.needed for available, error in refusals)
    refusals.clear()  # with the frames that hold caches
    held = None
    rows.clear()
    assert pool.num_free_blocks + pool.num_evictable_blocks == pool.num_blocks

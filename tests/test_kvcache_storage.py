"""BlockPool and PagedKVCache: layers, sharing, exhaustion, ownership."""

from __future__ import annotations

import gc

import pytest
import torch

from torch_winnow import _core, reference
from torch_winnow.kvcache import BlockPool, BlockPoolExhausted, PagedKVCache, paged_attention


def make_pool(blocks=16, *, layers=1, heads=2, dim=4, block_size=4, dtype=torch.float32, **options):
    return BlockPool(
        blocks,
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=dim,
        block_size=block_size,
        dtype=dtype,
        **options,
    )


def tokens(rows, count, *, heads=2, dim=4, dtype=torch.float32):
    return torch.randn(rows, heads, count, dim).to(dtype), torch.randn(rows, heads, count, dim).to(
        dtype
    )


def gather(cache, layer, row):
    """Keys and values of one row, (Hkv, length, D)."""
    pool, length = cache.pool, int(cache.seq_lens[row])
    blocks = cache.block_table[row, : -(-length // pool.block_size)].long()
    return tuple(
        pages[layer, blocks].transpose(0, 1).flatten(1, 2)[:, :length]
        for pages in (pool.key_pages, pool.value_pages)
    )


def test_pool_describes_itself():
    pool = make_pool(5, layers=3, dim=8, value_head_dim=6, dtype=torch.bfloat16)
    assert pool.key_pages.shape == (3, 5, 2, 4, 8)
    assert pool.value_pages.shape == (3, 5, 2, 4, 6)
    assert pool.key_pages.dtype == pool.dtype == torch.bfloat16
    assert (pool.num_blocks, pool.num_free_blocks, pool.value_head_dim) == (5, 5, 6)
    assert "5 free" in repr(pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cache_and_attention_agree_with_dense(dtype):
    """Prefill and decode through the cache, two layers, against plain attention."""
    pool = make_pool(layers=2, dtype=dtype)
    cache = PagedKVCache(pool, 3)
    steps = [5, 1, 1, 6, 0, 1]
    dense = [tokens(3, sum(steps), dtype=dtype) for _ in range(2)]
    start = 0
    for step in steps:
        for layer in range(2):
            key, value = dense[layer]
            chunk = slice(start, start + step)
            cache.append(layer, key[:, :, chunk], value[:, :, chunk])
            assert cache.seq_lens.tolist() == [start + step] * 3
            query = torch.randn(3, 4, step, 4).to(dtype)
            pages = pool.key_pages[layer], pool.value_pages[layer]
            out = paged_attention(query, *pages, cache.block_table, cache.seq_lens)
            whole = torch.arange(3, dtype=torch.int32)[:, None]
            lengths = torch.full((3,), start + step, dtype=torch.int32)
            expected = reference.paged_attention(query, key, value, whole, lengths)
            close = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
            torch.testing.assert_close(out, expected, **close)
        start += step


def test_layers_fill_the_same_positions_in_any_order():
    """seq_lens is that of the furthest layer; each layer fills on from its own end."""
    pool = make_pool(layers=3)
    cache = PagedKVCache(pool, 1)
    keys = [tokens(1, 6)[0] for _ in range(3)]
    cache.append(2, keys[2][:, :, :3], keys[2][:, :, :3])  # the last layer first
    assert cache.seq_lens.tolist() == [3]
    cache.append(0, keys[0][:, :, :2], keys[0][:, :, :2])
    assert cache.seq_lens.tolist() == [3]
    cache.append(0, keys[0][:, :, 2:6], keys[0][:, :, 2:6])  # overtakes
    assert cache.seq_lens.tolist() == [6]
    cache.append(1, keys[1], keys[1])  # two steps at once
    cache.append(2, keys[2][:, :, 3:], keys[2][:, :, 3:])
    assert cache.seq_lens.tolist() == [6]
    assert pool.num_free_blocks == 14
    for layer in range(3):
        assert torch.equal(gather(cache, layer, 0)[0], keys[layer][0])


def test_partial_step_forked():
    """A fork between two layers of one step: both sides finish it, each in a block of its own."""
    pool = make_pool(layers=2)
    cache = PagedKVCache(pool, 1)
    old, new = tokens(1, 3)[0], tokens(1, 1)[0]
    for layer in range(2):
        cache.append(layer, old, old)
    cache.append(0, new, new)
    fork = cache.fork([0])
    mine, theirs = tokens(1, 1)[0], tokens(1, 1)[0]
    cache.append(1, mine, mine)
    assert pool.num_free_blocks == 14
    fork.append(1, theirs, theirs)
    assert pool.num_free_blocks == 14
    for owner, last in ((cache, mine), (fork, theirs)):
        assert torch.equal(gather(owner, 0, 0)[0], torch.cat([old, new], 2)[0])
        assert torch.equal(gather(owner, 1, 0)[0], torch.cat([old, last], 2)[0])


def test_lengths_per_row():
    pool = make_pool()
    cache = PagedKVCache(pool, 3)
    key, value = tokens(3, 5)
    cache.append(0, key, value, lengths=torch.tensor([5, 0, 2]))
    assert cache.seq_lens.tolist() == [5, 0, 2]
    assert pool.num_free_blocks == 13
    more, _ = tokens(3, 1)
    cache.append(0, more, more)
    assert torch.equal(gather(cache, 0, 1)[0], more[1])
    assert torch.equal(gather(cache, 0, 2)[0], torch.cat([key[2, :, :2], more[2]], 1))


@pytest.mark.parametrize("owners", [2, 3, 5])
def test_owners_cost_one_copy_less(owners):
    """K owners of a part block need K - 1 blocks: enough is enough, one less is too little."""
    for spare in (owners - 2, owners - 1):
        pool = make_pool(2 + spare, layers=2)
        cache = PagedKVCache(pool, 1)
        key, value = tokens(1, 6)
        for layer in range(2):
            cache.append(layer, key, value)
        forks = cache.fork([0] * owners)
        del cache
        before = forks.block_table.clone(), pool.key_pages.clone()
        new, _ = tokens(owners, 1)
        if spare < owners - 1:
            with pytest.raises(BlockPoolExhausted) as error:
                forks.append(0, new, new)
            assert (error.value.needed, error.value.free) == (owners - 1, spare)
            assert error.value.total == pool.num_blocks
            assert f"{owners - 1} blocks needed, {spare} free" in str(error.value)
            assert torch.equal(forks.block_table, before[0])
            assert torch.equal(pool.key_pages, before[1])
            assert forks.seq_lens.tolist() == [6] * owners
            continue
        forks.append(0, new, new)
        assert pool.num_free_blocks == 0
        for r in range(owners):
            assert torch.equal(gather(forks, 0, r)[0], torch.cat([key[0], new[r]], 1))
            assert torch.equal(gather(forks, 1, r)[0][:, :6], key[0])  # copies cover all layers


def test_full_blocks_stay_shared():
    pool = make_pool(4)
    cache = PagedKVCache(pool, 1)
    cache.append(0, *tokens(1, 8))
    forks = cache.fork([0, 0])
    forks.append(0, *tokens(2, 1))
    assert pool.num_free_blocks == 0
    assert forks.block_table[:, :2].tolist() == [cache.block_table[0].tolist()] * 2
    assert pool.num_owners(int(cache.block_table[0, 0])) == 3


def test_permute_is_a_resample():
    pool = make_pool()
    cache = PagedKVCache(pool, 4)
    key, value = tokens(4, 7)
    cache.append(0, key, value)
    assert pool.num_free_blocks == 8
    cache.permute_(torch.tensor([3, 1, 1, 0]))
    assert pool.num_free_blocks == 10
    for row, ancestor in enumerate([3, 1, 1, 0]):
        assert torch.equal(gather(cache, 0, row)[0], key[ancestor])
        assert torch.equal(gather(cache, 0, row)[1], value[ancestor])
    cache.append(0, *tokens(4, 1))
    assert pool.num_free_blocks == 9


def test_truncate_rolls_back():
    pool = make_pool(layers=2)
    cache = PagedKVCache(pool, 2)
    key, value = tokens(2, 9)
    cache.append(0, key, value)
    cache.append(1, key[:, :, :5], value[:, :, :5])  # a layer that lags behind
    cache.truncate_([7, 0])
    assert cache.seq_lens.tolist() == [7, 0]
    assert pool.num_free_blocks == 14
    new, _ = tokens(2, 2)
    cache.append(0, new, new)
    cache.append(1, new, new)
    assert cache.seq_lens.tolist() == [9, 2]
    assert torch.equal(gather(cache, 0, 0)[0], torch.cat([key[0, :, :7], new[0]], 1))
    assert torch.equal(gather(cache, 1, 0)[0][:, :7], torch.cat([key[0, :, :5], new[0]], 1))


def test_write_copies_what_is_shared():
    pool = make_pool()
    cache = PagedKVCache(pool, 2)
    key, value = tokens(2, 6)
    cache.append(0, key, value)
    fork = cache.fork([0, 1])
    new, other = tokens(2, 3)
    fork.write(0, new, other, torch.tensor([[5, 1, 5], [0, 3, 2]]))  # of equal ones the last wins
    assert pool.num_free_blocks == 16 - 4 - 3
    for row in range(2):
        assert torch.equal(gather(cache, 0, row)[0], key[row])
    expected = key.clone()
    expected[0, :, [1, 5]] = new[0, :, 1:]
    expected[1, :, [0, 3, 2]] = new[1]
    for row in range(2):
        assert torch.equal(gather(fork, 0, row)[0], expected[row])


def test_a_freed_row_starts_anew():
    pool = make_pool()
    cache = PagedKVCache(pool, 2)
    cache.append(0, *tokens(2, 5))
    cache.free([0])
    assert pool.num_free_blocks == 14
    assert cache.seq_lens.tolist() == [0, 5]
    assert cache.block_table[0].tolist() == [-1, -1]
    with pytest.raises(ValueError, match="rows: row 0 is already free"):
        cache.free([1, 0])
    with pytest.raises(ValueError, match="rows: row 1 is already free"):
        cache.free([1, 1])
    assert cache.seq_lens.tolist() == [0, 5]
    key, value = tokens(2, 2)
    cache.append(0, key, value)
    assert cache.seq_lens.tolist() == [2, 7]
    assert torch.equal(gather(cache, 0, 0)[1], value[0])
    cache.free([0])


def test_a_dropped_cache_returns_its_blocks():
    pool = make_pool()
    cache = PagedKVCache(pool, 2)
    cache.append(0, *tokens(2, 5))
    forks = [cache.fork([0, 1, 1]) for _ in range(3)]
    del cache
    gc.collect()
    assert pool.num_free_blocks == 12
    forks.clear()
    gc.collect()
    assert pool.num_free_blocks == 16


def test_blocks_outlive_the_python_pool():
    cache = PagedKVCache(make_pool(), 1)
    gc.collect()
    cache.append(0, *tokens(1, 5))
    assert cache.pool.num_free_blocks == 14


def test_a_pool_grows_under_its_caches():
    pool = make_pool(2, layers=2)
    cache, other = PagedKVCache(pool, 1), PagedKVCache(pool, 2)
    key, value = tokens(1, 11)
    cache.append(0, key[:, :, :7], value[:, :, :7])
    with pytest.raises(BlockPoolExhausted):
        cache.append(0, key[:, :, 7:], value[:, :, 7:])
    pool.grow(3)
    assert (pool.num_blocks, pool.num_free_blocks) == (3, 1)
    assert pool.key_pages.shape[1] == pool.value_pages.shape[1] == 3
    cache.append(0, key[:, :, 7:], value[:, :, 7:])
    assert torch.equal(gather(cache, 0, 0)[0], key[0])
    with pytest.raises(BlockPoolExhausted):
        other.append(1, *tokens(2, 1))
    with pytest.raises(ValueError, match="num_blocks: expected at least 3, got 2"):
        pool.grow(2)
    with pytest.raises(ValueError, match="num_blocks: expected 3 <= num_blocks < 2"):
        pool._native.grow(2)
    with pytest.raises(ValueError, match="num_blocks: expected an integer, got 4.0"):
        pool.grow(4.0)
    assert (pool.num_blocks, pool.num_free_blocks) == (3, 0)


def test_native_pool_refuses_misuse():
    pool = _core.BlockPool(2)
    block = pool.allocate()
    pool.retain(block)
    pool.release(block)
    pool.release(block)
    with pytest.raises(ValueError, match="cannot release block 0, which is free"):
        pool.release(block)
    with pytest.raises(ValueError, match="cannot retain block 0, which is free"):
        pool.retain(block)
    for foreign in (-1, 2):
        with pytest.raises(ValueError, match=f"block: expected 0 <= block < 2, got {foreign}"):
            pool.release(foreign)
    assert pool.num_free == 2
    pool.allocate(), pool.allocate()
    with pytest.raises(BlockPoolExhausted, match="1 blocks needed, 0 free of 2"):
        pool.allocate()


def test_empty_caches():
    pool = make_pool(0)
    cache = PagedKVCache(pool, 0)
    cache.append(0, *tokens(0, 3))
    assert cache.block_table.shape == (0, 0)
    one = PagedKVCache(pool, 1)
    one.append(0, *tokens(1, 0))
    assert one.fork([]).seq_lens.shape == (0,)
    with pytest.raises(BlockPoolExhausted, match="1 blocks needed, 0 free of 0"):
        one.append(0, *tokens(1, 1))
    assert one.seq_lens.tolist() == [0]


def test_strided_tokens():
    pool = make_pool()
    cache = PagedKVCache(pool, 2)
    packed = torch.randn(2, 5, 2, 12)  # as a fused projection leaves them: (B, T, H, 3 D)
    key, value = packed.transpose(1, 2)[..., 4:8], packed.transpose(1, 2)[..., 8:]
    cache.append(0, key, value)
    for row in range(2):
        assert torch.equal(gather(cache, 0, row)[0], key[row])
        assert torch.equal(gather(cache, 0, row)[1], value[row])


def test_ops_are_checked_and_compile():
    pool = make_pool(4, layers=2)
    key, value = tokens(2, 3)
    table = torch.tensor([[3, 1], [0, -1]], dtype=torch.int32)
    positions = torch.tensor([[2, -1, 6], [3, 0, 1]])
    pages = pool.key_pages[1], pool.value_pages[1]
    arguments = (*pages, key, value, table, positions)
    torch.library.opcheck(torch.ops.winnow.paged_write_.default, arguments)
    copies = torch.tensor([0, 3]), torch.tensor([2, 1])
    pools = pool.key_pages, pool.value_pages
    torch.library.opcheck(torch.ops.winnow.copy_blocks_.default, (*pools, *copies))

    @torch.compile(fullgraph=True)
    def step(key_pages, value_pages):
        torch.ops.winnow.paged_write_(key_pages, value_pages, key, value, table, positions)
        return key_pages.sum()

    assert torch.equal(step(pages[0].clone(), pages[1].clone()), step(*pages))
    assert torch.equal(pages[0][1, :, 2], key[0, :, 2])
    with pytest.raises(ValueError, match=r"positions: expected -1 or 0 <= position < 8"):
        torch.ops.winnow.paged_write_(*arguments[:5], positions + 4)
    with pytest.raises(ValueError, match=r"block_table: expected 0 <= block < 4 .*got -1"):
        torch.ops.winnow.paged_write_(*arguments[:5], positions + 1)
    with pytest.raises(ValueError, match=r"target: expected 0 <= block < 4, got 4"):
        torch.ops.winnow.copy_blocks_(*pools, copies[0], torch.tensor([4, 1]))

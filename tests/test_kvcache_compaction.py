"""compact_ against indexing of dense keys: any positions, shared blocks, exhaustion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_winnow import reference
from torch_winnow._kvcache import compaction
from torch_winnow.kvcache import (
    BlockPool,
    BlockPoolExhausted,
    PagedKVCache,
    attention_mass,
    block_summaries,
    h2o_positions,
    paged_attention,
    snapkv_positions,
)

LAYERS, HEADS, DIM, SIZE = 2, 2, 3, 4


def make_pool(blocks=24, dtype=torch.float32, **options):
    return BlockPool(
        blocks,
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        block_size=SIZE,
        dtype=dtype,
        **options,
    )


def filled(pool, *lengths):
    cache = PagedKVCache(pool, len(lengths))
    for layer in range(LAYERS):
        key, value = torch.randn(2, len(lengths), HEADS, max(lengths, default=0), DIM).to(
            pool.dtype
        )
        cache.append(layer, key, value, lengths=list(lengths))
    return cache


def dense(cache, row, pages=None):
    """(num_layers, Hkv, n, D) of a row."""
    pages = cache.pool.key_pages if pages is None else pages
    j = torch.arange(int(cache.seq_lens[row]))
    return pages[:, cache.block_table[row, j // SIZE].long(), :, j % SIZE].permute(1, 2, 0, 3)


def snapshot(cache):
    pages = (cache.pool.key_pages, cache.pool.value_pages)
    return [[dense(cache, row, p).clone() for p in pages] for row in range(cache.batch_size)]


def holds(cache, snapshots):
    for row, expected in enumerate(snapshots):
        for pages, dense_row in zip(
            (cache.pool.key_pages, cache.pool.value_pages), expected, strict=True
        ):
            assert torch.equal(dense(cache, row, pages), dense_row)


def kept_of(snapshots, keep):
    """What a cache holds after compact_(keep)."""
    keep = keep[None, :, None] if keep.dim() == 2 else keep[None] if keep.dim() == 3 else keep
    keep = keep.long().expand(LAYERS, -1, HEADS, -1)
    rows = []
    for row, pair in enumerate(snapshots):
        lists = keep[:, row][keep[:, row] >= 0].view(LAYERS, HEADS, -1)
        index = lists[..., None].expand(-1, -1, -1, DIM)
        rows.append([x.gather(2, index) for x in pair])
    return rows


def random_keep(lengths, counts, heads=False, layers=False):
    """Ascending positions, counts[b] of lengths[b], padded with -1."""
    keep = torch.full((LAYERS, len(lengths), HEADS, max(counts, default=0) + 1), -1)
    for layer in range(LAYERS):
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            for head in range(HEADS):
                keep[layer, row, head, :count] = torch.randperm(length)[:count].sort().values
    return keep if layers else keep[0] if heads else keep[0, :, 0]


@pytest.mark.parametrize("shape", ["shared", "heads", "layers"])
def test_keeps_what_is_named(shape, dtype):
    cache = filled(make_pool(dtype=dtype), 15, 8, 0, 1)
    before = snapshot(cache)
    lengths, counts = [15, 8, 0, 1], [7, 8, 0, 1]
    keep = random_keep(lengths, counts, heads=shape == "heads", layers=shape == "layers")
    keep = keep.int() if shape == "shared" else keep
    cache.compact_(keep)
    assert cache.seq_lens.tolist() == counts
    holds(cache, kept_of(before, keep))
    assert cache.pool.num_free_blocks == 24 - 2 - 2 - 1
    for layer in range(LAYERS):
        cache.append(layer, *torch.randn(2, 4, HEADS, 1, DIM).to(dtype).unbind())
    assert cache.seq_lens.tolist() == [8, 9, 1, 2]


def test_nothing_and_everything():
    cache = filled(make_pool(), 9, 5)
    before, table = snapshot(cache), cache.block_table.clone()
    cache.compact_(torch.tensor([list(range(9)), [*range(5), -1, -1, -1, -1]]))
    assert torch.equal(cache.block_table, table)
    holds(cache, before)
    cache.compact_(torch.empty(2, 0, dtype=torch.int64))
    assert cache.seq_lens.tolist() == [0, 0]
    assert cache.pool.num_free_blocks == 24
    cache.compact_(torch.full((2, 3), -1))
    PagedKVCache(make_pool(), 0).compact_(torch.empty(0, 3, dtype=torch.int64))


def test_shared_blocks_are_left_alone():
    pool = make_pool()
    cache = filled(pool, 15, 8)
    twin = cache.fork([0, 0, 1])
    before, twins = snapshot(cache), snapshot(twin)
    keep = torch.tensor([[0, 1, 2, 3, 5, 9, 14], [0, 1, 2, -1, -1, -1, -1], [7] + [-1] * 6])
    table = twin.block_table.clone()
    twin.compact_(keep)
    holds(cache, before)
    holds(twin, kept_of(twins, keep))
    # What does not change is still shared; rows 0 and 2 have one new block each.
    assert twin.block_table[0, 0] == table[0, 0]
    assert twin.block_table[1, 0] == table[1, 0]
    assert pool.num_free_blocks == 24 - 4 - 2 - 2


def test_rows_may_move_in_any_order(monkeypatch):
    """Rows move at the same time: none reads a block that another one writes to."""
    twin = filled(make_pool(), 15).fork([0, 0, 0])
    keep = torch.tensor([[1, 2, 3, 4, 5, 6], [9, 10, 11, 12, 13, 14], [2, 4, 6, 8, 10, 12]])
    expected = kept_of(snapshot(twin), keep)
    move = torch.ops.winnow.compact_pages_

    def last_row_first(pages, table, keep):
        for row in (2, 1, 0):
            one = slice(row, row + 1)
            move(pages, table[one], keep[:, one].contiguous())

    monkeypatch.setattr(compaction, "_compact_pages_", last_row_first)
    twin.compact_(keep)
    holds(twin, expected)


def test_registered_prefixes_stay_what_they_are():
    pool = make_pool()
    cache = filled(pool, 12)
    cache.register_prefix(range(12))
    before = snapshot(cache)
    cache.compact_(torch.tensor([[0, 1, 2, 3, 6, 7, 8]]))
    other = PagedKVCache(pool, 1)
    assert other.match_prefix(range(12)) == 4
    holds(other, [[x[:, :, :4] for x in before[0]]])
    sharing = filled(pool, 12)
    sharing.register_prefix(range(100, 112))
    expected = snapshot(sharing)
    both = sharing.fork([0])
    both.compact_(torch.tensor([[5, 6, 11]]))
    third = PagedKVCache(pool, 1)
    assert third.match_prefix(range(100, 112)) == 12
    holds(third, expected)


def test_exhaustion_changes_nothing():
    pool = make_pool(blocks=5)
    cache = filled(pool, 15)
    twin = cache.fork([0, 0])
    before, table = snapshot(twin), twin.block_table.clone()
    keep = torch.tensor([[1, 2, 3], [2, 3, 4]])
    with pytest.raises(BlockPoolExhausted):
        twin.compact_(keep)
    assert torch.equal(twin.block_table, table)
    assert twin.seq_lens.tolist() == [15, 15]
    holds(twin, before)
    assert pool.num_free_blocks == 1
    pool.grow(6)
    twin.compact_(keep)
    holds(twin, kept_of(before, keep))
    assert pool.num_free_blocks == 0


@pytest.mark.parametrize("kind", ["minmax", "mean"])
def test_summaries_and_bias_follow(kind):
    pool = make_pool(summaries=kind, key_bias=True)
    cache = filled(pool, 15, 8)
    assert (pool.key_bias == 0).all()
    pool.key_bias[:] = torch.randn_like(pool.key_bias)
    twin = cache.fork([0, 1])
    biases = [dense(twin, row, pool.key_bias[..., None]) for row in range(2)]
    keep = random_keep([15, 8], [9, 3], heads=True)
    twin.compact_(keep)
    for checked in (cache, twin):
        held = checked.block_table >= 0
        for layer in range(LAYERS):
            ours = pool.summaries[layer][checked.block_table.clamp(min=0).long()]
            exact = block_summaries(
                pool.key_pages[layer], checked.block_table, checked.seq_lens, kind
            )
            assert torch.equal(ours[held], exact.transpose(1, 2)[held])
    for row in range(2):
        lists = keep[row][keep[row] >= 0].view(1, HEADS, -1, 1).expand(LAYERS, -1, -1, -1)
        bias = dense(twin, row, pool.key_bias[..., None])
        assert torch.equal(bias, biases[row].gather(2, lists))
    # New tokens stand for themselves.
    twin.append(0, *torch.randn(2, 2, HEADS, 1, DIM).unbind())
    assert (pool.key_bias[0, twin.block_table[0, 2].long(), :, 1] == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_compaction_of_any_forks(data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    pool = make_pool(blocks=20)
    lengths = data.draw(st.lists(st.integers(0, 13), min_size=1, max_size=3))
    cache = filled(pool, *lengths)
    parents = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=3))
    twin = cache.fork(parents)
    held = [lengths[p] for p in parents]
    counts = [data.draw(st.integers(0, n)) for n in held]
    keep = random_keep(held, counts, layers=data.draw(st.booleans()))
    before, twins = snapshot(cache), snapshot(twin)
    free = pool.num_free_blocks
    try:
        twin.compact_(keep)
    except BlockPoolExhausted:
        assert pool.num_free_blocks == free
        holds(twin, twins)
    else:
        holds(twin, kept_of(twins, keep))
    holds(cache, before)
    del twin, cache
    assert pool.num_free_blocks == 20


def test_eviction_end_to_end():
    """What SnapKV and H2O keep goes straight into compact_, and attention goes on."""
    pool = make_pool()
    cache = filled(pool, 15, 8)
    query = torch.randn(LAYERS, 2, 4, 3, DIM)
    masses = [
        attention_mass(query[i], pool.key_pages[i], cache.block_table, cache.seq_lens)
        for i in range(LAYERS)
    ]
    keep = torch.stack(
        [snapkv_positions(mass, cache.seq_lens, capacity=8, window=3) for mass in masses]
    )
    before = snapshot(cache)
    cache.compact_(keep)
    holds(cache, kept_of(before, keep))
    cache.compact_(h2o_positions(masses[0][..., :8], cache.seq_lens, heavy=2, recent=3))
    assert cache.seq_lens.tolist() == [5, 5]
    pages = pool.key_pages[1], pool.value_pages[1]
    out = paged_attention(query[1], *pages, cache.block_table, cache.seq_lens)
    expected = reference.paged_attention(query[1], *pages, cache.block_table, cache.seq_lens)
    torch.testing.assert_close(out, expected)


def test_operator(dtype):
    pages = torch.randn(LAYERS, 12, HEADS, SIZE, 5).to(dtype)
    table = torch.tensor([[3, 0, 7], [5, 6, -1]]).int()
    keep = torch.tensor([[[[0, 2, 4, 5, 11]], [[1, 3, 6, -1, -1]]]])
    expected = pages.clone()
    reference.compact_pages_(expected, table, keep)
    op = torch.ops.winnow.compact_pages_
    ours = pages.clone()
    op(ours, table, keep)
    assert torch.equal(ours, expected)
    wide = torch.randn(LAYERS, 12, SIZE, HEADS, 9).to(dtype).transpose(2, 3)[..., 2:7].copy_(pages)
    op(wide, table, keep)
    assert torch.equal(wide, expected)
    torch.library.opcheck(op.default, (pages.clone(), table, keep))


def test_errors_name_the_argument():
    cache = filled(make_pool(), 9, 5)
    before = snapshot(cache)
    for keep, message in [
        (torch.zeros(3, 1).long(), r"expected \(B, K\).*B=2 and Hkv=2, got \(3, 1\)"),
        (torch.zeros(3, 2, 2, 1).long(), r"got \(3, 2, 2, 1\)"),
        ([[0], [1]], r"expected \(B, K\)"),
        (torch.zeros(2, 1), "expected int32 or int64, got torch.float32"),
        (torch.tensor([[0, 1], [0, 5]]), r"0 <= position < seq_len.*row 1 of 5 tokens"),
        (torch.tensor([[0, 1], [-2, 3]]), r"\[\[-2, 3\]\].*row 1"),
        (torch.tensor([[1, 1], [0, 1]]), "ascending.*row 0 of 9"),
        (torch.tensor([[-1, 1], [0, 1]]), "ascending.*row 0"),
        (torch.tensor([[[0, 1], [0, -1]]] * 2), r"as many .*\[1, 1\] to \[2, 2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.compact_(keep)
    holds(cache, before)
    cache.append(0, *torch.randn(2, 2, HEADS, 1, DIM).unbind())
    with pytest.raises(ValueError, match="every layer must have stored the same tokens"):
        cache.compact_(torch.tensor([[0], [1]]))
    op = torch.ops.winnow.compact_pages_
    pages, table = torch.zeros(LAYERS, 4, HEADS, SIZE, 2), torch.tensor([[0, 1]]).int()
    for bad, message in [
        ((pages, table, torch.tensor([[[[8]]]])), "block_table: .*at position 8"),
        ((pages, table + 3, torch.tensor([[[[0, 4]]]])), "block_table: .*position 4 .*got 4"),
        ((pages, table - 1, torch.tensor([[[[4]]]])), "block_table: .*position 0 .*got -1"),
        ((pages, table, torch.tensor([[[[2, 1]]]])), "keep: expected ascending"),
        ((pages, table, torch.zeros(1, 2, 1, 1).long()), "block_table: .*B=2"),
        ((pages, table, torch.zeros(3, 1, 1, 1).long()), "keep: .*num_layers=2"),
        ((pages[0], table, torch.zeros(1, 1, 1, 1).long()), "pages: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            op(*bad)

"""Summaries that a pool keeps up to date, and the choice by them, against making both afresh."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_winnow import reference
from torch_winnow.kvcache import (
    BlockPool,
    BlockPoolExhausted,
    PagedKVCache,
    block_summaries,
    score_blocks,
    score_select_blocks,
    select_blocks,
)

INF, NAN = float("inf"), float("nan")
KINDS = ["minmax", "mean"]


def make_pool(kind="minmax", blocks=24, dtype=torch.float32, **options):
    sizes = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 5, "block_size": 4} | options
    return BlockPool(blocks, dtype=dtype, summaries=kind, **sizes)


def tokens(cache, count):
    pool = cache.pool
    shape = (cache.batch_size, pool.num_kv_heads, count, pool.head_dim)
    return torch.randn(2, *shape).to(pool.dtype).unbind()


def append(cache, count, lengths=None):
    for layer in range(cache.pool.num_layers):
        cache.append(layer, *tokens(cache, count), lengths=lengths)


def kept(cache, layer):
    """The pool's summaries of the blocks of a cache, as block_summaries lays them out."""
    table = cache.block_table.clamp(min=0).long()
    return cache.pool.summaries[layer][table].transpose(1, 2)


def afresh(cache, layer):
    pool = cache.pool
    return block_summaries(
        pool.key_pages[layer], cache.block_table, cache.seq_lens, pool.summary_kind
    )


def agree(*caches):
    for cache in caches:
        held = cache.block_table >= 0
        for layer in range(cache.pool.num_layers):
            ours, expected = kept(cache, layer), afresh(cache, layer)
            assert torch.equal(ours.transpose(1, 2)[held], expected.transpose(1, 2)[held])


@pytest.mark.parametrize("kind", KINDS)
def test_appends_and_writes_keep_them(kind, dtype):
    cache = PagedKVCache(make_pool(kind, dtype=dtype), 3)
    assert cache.pool.summaries.dtype == torch.float32
    append(cache, 6, [6, 0, 3])
    agree(cache)
    for _ in range(5):
        append(cache, 1)
        agree(cache)
    append(cache, 9)
    agree(cache)
    for layer in (0, 1):
        cache.write(layer, *tokens(cache, 4), torch.tensor([[3, 0, 18, 9], [1, 2, 3, 1], [5] * 4]))
        agree(cache)


def test_an_extreme_that_is_overwritten_goes():
    cache = PagedKVCache(make_pool(num_layers=1), 1)
    key, value = tokens(cache, 4)
    key[0, 0, 2] = 100
    cache.append(0, key, value)
    assert cache.pool.summaries[0, cache.block_table[0, 0], 0, 1].min() == 100
    cache.write(0, -key[:, :, :1], value[:, :, :1], torch.tensor([[2]]))
    assert cache.pool.summaries.max() < 100
    agree(cache)


@pytest.mark.parametrize("kind", KINDS)
def test_forks_copy_them_and_new_owners_replace_them(kind):
    pool = make_pool(kind)
    cache = PagedKVCache(pool, 2)
    append(cache, 7)
    twin = cache.fork([1, 0, 1])
    agree(cache, twin)
    twin.append(0, *tokens(twin, 1))  # copies the last blocks, of both layers
    agree(cache)
    assert torch.equal(
        pool.summaries[1, twin.block_table[0, 1]], pool.summaries[1, cache.block_table[1, 1]]
    )
    twin.append(1, *tokens(twin, 1))
    agree(cache, twin)
    cache.permute_([1, 1])
    append(cache, 3)
    cache.free([0])
    twin.truncate_([0, 8, 0])
    pool.grow(40)
    append(cache, 2)
    append(twin, 5)
    agree(cache, twin)


def test_after_truncation_they_bound_and_the_next_append_makes_them_exact():
    cache = PagedKVCache(make_pool(), 2)
    append(cache, 11)
    twin = cache.fork([0, 1])
    cache.truncate_([6, 1])
    for layer in (0, 1):
        ours, expected = kept(cache, layer), afresh(cache, layer)
        held = (cache.block_table >= 0)[:, None, :, None].expand_as(ours[..., 0, :])
        assert (ours[..., 0, :] <= expected[..., 0, :])[held].all()
        assert (ours[..., 1, :] >= expected[..., 1, :])[held].all()
    append(cache, 1)
    agree(cache, twin)


def test_exhaustion_changes_no_summary():
    cache = PagedKVCache(make_pool(blocks=3), 1)
    append(cache, 6)
    twin = cache.fork([0, 0])
    before = cache.pool.summaries.clone()
    with pytest.raises(BlockPoolExhausted):
        append(twin, 1)
    assert torch.equal(cache.pool.summaries, before)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2**31)), max_size=14))
def test_any_sequence_of_operations_keeps_a_bound(steps):
    """Whatever happens, no key lies outside of the minimum and maximum of its block."""
    torch.manual_seed(0)
    pool = make_pool(blocks=16, head_dim=2)
    caches = [PagedKVCache(pool, 2)]
    for kind, number in steps:
        cache = caches[number % len(caches)]
        lengths = cache.seq_lens.tolist()
        try:
            if kind <= 1:
                append(cache, 1 + number % 6)
            elif kind == 2 and min(lengths) > 0:
                where = torch.tensor([[number % n, number // 7 % n] for n in lengths])
                for layer in (0, 1):
                    cache.write(layer, *tokens(cache, 2), where)
            elif kind == 3 and len(caches) < 3:
                caches.append(cache.fork([number % 2, number // 2 % 2]))
            elif kind == 4:
                cache.permute_([number % 2, number // 2 % 2])
            elif kind == 5:
                cache.truncate_([number % (n + 1) for n in lengths])
            elif kind == 6 and len(caches) > 1:
                caches.remove(cache)
        except BlockPoolExhausted:
            caches = caches[:1]
        for checked in caches:
            for layer in (0, 1):
                ours, exact = kept(checked, layer), afresh(checked, layer)
                held = (checked.block_table >= 0)[:, None, :, None].expand_as(ours[..., 0, :])
                assert (ours[..., 0, :] <= exact[..., 0, :])[held].all()
                assert (ours[..., 1, :] >= exact[..., 1, :])[held].all()


def scattered(dtype, kind, *, dim=37, blocks=12):
    key = torch.randn(blocks, 2, 16, dim).to(dtype)
    table = torch.tensor([[7, 2, 9, 4, 1], [11, 0, -1, -1, -1], [-1] * 5], dtype=torch.int32)
    lengths = torch.tensor([77, 17, 0], dtype=torch.int32)
    sizes = (blocks, 2, 2, dim) if kind == "minmax" else (blocks, 2, dim)
    summaries = torch.full(sizes, NAN)  # what a table does not name is not read
    positions = torch.arange(80).expand(3, -1).clone()
    positions[positions >= lengths[:, None]] = -1
    torch.ops.winnow.update_block_summaries_(summaries, key, table, lengths, positions)
    return key, table, lengths, summaries


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 16, 37])
def test_update_matches_definition(kind, dim, dtype, cpu_capability):
    key, table, lengths, summaries = scattered(dtype, kind, dim=dim)
    expected = torch.full_like(summaries, NAN)
    everything = torch.arange(77).expand(3, -1).clone()
    everything[everything >= lengths[:, None]] = -1
    reference.update_block_summaries_(expected, key, table, lengths, everything)
    torch.testing.assert_close(summaries, expected, equal_nan=True)
    assert summaries.isnan().any()
    few = torch.tensor([[76, -1, 33, 33], [-1] * 4, [-1] * 4])
    key += 1
    torch.ops.winnow.update_block_summaries_(summaries, key, table, lengths, few)
    reference.update_block_summaries_(expected, key, table, lengths, few)
    torch.testing.assert_close(summaries, expected, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_through_the_table_are_those_of_a_gather(kind, dtype, cpu_capability):
    key, table, lengths, summaries = scattered(dtype, kind)
    query = torch.randn(3, 4, 2, 37).to(dtype)
    scores = score_blocks(query, summaries, table)
    gathered = summaries[table.clamp(min=0).long()].transpose(1, 2)
    expected = score_blocks(query, gathered.contiguous())
    held = (table >= 0)[:, None].expand(3, 2, 5)
    assert torch.equal(scores[held], expected[held])
    assert (scores[~held] == 0).all()
    exact = reference.score_blocks(query.double(), summaries.double(), table)
    torch.testing.assert_close(scores.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "sinks", "recents"), [(2, 1, 1), (3, 0, 0), (4, 2, 1), (9, 1, 1)])
def test_the_fused_choice_is_the_composed_one(kind, k, sinks, recents, dtype):
    key, table, lengths, summaries = scattered(dtype, kind)
    query = torch.randn(3, 4, 1, 37).to(dtype)
    options = {"seq_lens": lengths, "block_size": 16}
    options |= {"sink_blocks": sinks, "recent_blocks": recents}
    expected = select_blocks(score_blocks(query, summaries, table), k, **options)
    assert torch.equal(
        score_select_blocks(query, summaries, k, block_table=table, **options), expected
    )
    gathered = block_summaries(key, table, lengths, kind)
    assert torch.equal(score_select_blocks(query, gathered, k, **options), expected)
    definition = reference.score_select_blocks(query, summaries, k, block_table=table, **options)
    assert torch.equal(definition, expected)


def test_the_fused_choice_of_many_blocks(on_every_capability, on_thread_counts):
    summaries = torch.randn(900, 2, 2, 48)
    summaries[5] = NAN
    summaries[7] = summaries[6]
    table = torch.randperm(900).int().view(2, 450)
    lengths = torch.tensor([450 * 16, 449 * 16 - 3], dtype=torch.int32)
    query = torch.randn(2, 8, 1, 48)

    def choose():
        return score_select_blocks(
            query, summaries, 40, seq_lens=lengths, block_size=16, block_table=table
        )

    expected = select_blocks(
        score_blocks(query, summaries, table), 40, seq_lens=lengths, block_size=16
    )
    for result in on_every_capability(choose) + on_thread_counts(choose):
        assert torch.equal(result, expected)


def test_nothing_to_choose_from():
    empty = torch.empty(0, 2, 2, 8)
    table = torch.empty(3, 0, dtype=torch.int32)
    options = {"seq_lens": torch.zeros(3, dtype=torch.int32), "block_size": 4}
    query = torch.randn(3, 4, 1, 8)
    assert score_blocks(query, empty, table).shape == (3, 2, 0)
    assert (score_select_blocks(query, empty, 2, block_table=table, **options) == -1).all()
    no_rows = {"seq_lens": torch.zeros(0, dtype=torch.int32), "block_size": 4}
    chosen = score_select_blocks(query[:0], empty, 2, block_table=table[:0], **no_rows)
    assert chosen.shape == (0, 2, 2)


def test_opcheck_and_compile():
    key, table, lengths, summaries = scattered(torch.float32, "minmax")
    query = torch.randn(3, 4, 2, 37)
    ops = torch.ops.winnow
    positions = torch.tensor([[3, 40], [16, -1], [-1, -1]])
    clean = torch.zeros_like(summaries)
    torch.library.opcheck(
        ops.update_block_summaries_.default, (clean, key, table, lengths, positions)
    )
    summaries = summaries.nan_to_num()
    torch.library.opcheck(ops.score_blocks.default, (query, summaries, table))
    torch.library.opcheck(
        ops.score_select_blocks.default, (query, summaries, 3, lengths, 16, table, 1, 1)
    )

    def step(query, summaries, table, lengths):
        options = {"seq_lens": lengths, "block_size": 16, "block_table": table}
        return score_select_blocks(query, summaries, 3, **options)

    compiled = torch.compile(step, fullgraph=True)
    expected = step(query, summaries, table, lengths)
    assert torch.equal(compiled(query, summaries, table, lengths), expected)


def test_errors_name_the_argument():
    key, table, lengths, summaries = scattered(torch.float32, "minmax")
    query = torch.randn(3, 4, 1, 37)
    update = torch.ops.winnow.update_block_summaries_
    with pytest.raises(ValueError, match="summaries: expected 'minmax', 'mean' or None, got 'max'"):
        make_pool("max")
    with pytest.raises(ValueError, match=r"positions: expected -1 or .*< 77 .*got 77"):
        update(summaries, key, table, lengths, torch.full((3, 1), 77))
    with pytest.raises(ValueError, match=r"positions: expected \(B, T\) with B=3"):
        update(summaries, key, table, lengths, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"summaries: expected \(num_blocks, Hkv, D\) .*D=37"):
        update(summaries[..., :36], key, table, lengths, torch.full((3, 1), -1))
    wide = torch.empty(12, 2, 4, 37)[:, :, ::2]
    with pytest.raises(ValueError, match=r"side by side \(stride 37\), got stride 74"):
        update(wide, key, table, lengths, torch.full((3, 1), -1))
    with pytest.raises(ValueError, match=r"summaries: .*because there is a block_table"):
        score_blocks(query, summaries[..., :36], table)
    with pytest.raises(ValueError, match=r"block_table: expected -1 or 0 <= block < 12 .*got 12"):
        score_blocks(query, summaries, table.clamp(min=12))
    with pytest.raises(ValueError, match=r"block_table: expected \(B, max_blocks\) with B=3"):
        score_blocks(query, summaries, table[:2])
    with pytest.raises(ValueError, match=r"k: expected at least .*got 1"):
        score_select_blocks(query, summaries, 1, seq_lens=lengths, block_size=16, block_table=table)
    with pytest.raises(ValueError, match=r"seq_lens: .*\(the blocks of block_table\)"):
        score_select_blocks(query, summaries, 3, seq_lens=lengths, block_size=4, block_table=table)
    query.requires_grad_()
    with pytest.raises(ValueError, match="query: requires a gradient"):
        score_select_blocks(query, summaries, 3, seq_lens=lengths, block_size=16, block_table=table)

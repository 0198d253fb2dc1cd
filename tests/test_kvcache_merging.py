"""Merging similar tokens: against loops over the definition, and attention that stays the same."""

from __future__ import annotations

import math

import pytest
import torch

from torch_winnow import reference
from torch_winnow.kvcache import (
    BlockPool,
    BlockPoolExhausted,
    PagedKVCache,
    attention_mass,
    block_summaries,
    merge_runs,
    merge_similar_,
    paged_attention,
    similar_runs,
)

INF, NAN = float("inf"), float("nan")


def merged_run(key, value, bias, mass):
    """KVMerger's equations for one run."""
    live = [i for i in range(len(key)) if bias[i] != -INF]
    if not live:
        return torch.zeros_like(key[0]), torch.zeros_like(value[0]), -INF
    middle = (len(key) - 1) / 2
    votes = [mass[i] if mass is not None else -abs(i - middle) for i in range(len(key))]
    pivot = max(live, key=lambda i: (votes[i], -i))
    distance = [(key[i] - key[pivot]).norm().item() for i in live]
    mean = sum(distance) / len(live)
    kernel = [math.exp(-((d / mean) ** 2)) if d > 0 else 1.0 for d in distance]
    weight = torch.tensor(kernel).double() * torch.tensor([bias[i] for i in live]).double().exp()
    weight = (weight / weight.sum())[:, None]
    size = torch.tensor([bias[i] for i in live]).double().logsumexp(0).item()
    return (weight * key[live]).sum(0), (weight * value[live]).sum(0), size


@pytest.mark.parametrize("with_mass", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_runs_and_their_merger(with_mass, with_bias):
    key = torch.randn(3, 2, 1, 4) + 0.7 * torch.randn(3, 2, 17, 4).cumsum(2)
    key, value = key.double(), torch.randn(3, 2, 17, 5).double()
    lengths = torch.tensor([17, 9, 0])
    runs = similar_runs(key, lengths, threshold=0.8, recent=3)
    mass = torch.rand(3, 2, 17).double() if with_mass else None
    bias = torch.randint(0, 3, (3, 2, 17)).double().log() if with_bias else None
    ours = merge_runs(key, value, runs, key_bias=bias, mass=mass)
    sizes = set()
    for b, length in enumerate(lengths.tolist()):
        for h in range(2):
            expected: list[list[int]] = []
            for i in range(length):
                joins = i > 0 and i < length - 3
                joins = joins and torch.cosine_similarity(key[b, h, i], key[b, h, i - 1], 0) >= 0.8
                expected[-1].append(i) if joins else expected.append([i])
            numbers = [n for n, run in enumerate(expected) for _ in run]
            assert runs[b, h].tolist() == numbers + [-1] * (17 - length)
            for n, run in enumerate(expected):
                sizes.add(len(run))
                biases = [0.0 if bias is None else bias[b, h, i].item() for i in run]
                votes = None if mass is None else [mass[b, h, i].item() for i in run]
                one = merged_run(key[b, h, run], value[b, h, run], biases, votes)
                torch.testing.assert_close(ours[0][b, h, n], one[0])
                torch.testing.assert_close(ours[1][b, h, n], one[1])
                assert ours[2][b, h, n].item() == pytest.approx(one[2])
            assert (ours[2][b, h, len(expected) :] == -INF).all()
            assert (ours[0][b, h, len(expected) :] == 0).all()
    assert max(sizes) > 2
    assert 1 in sizes


def test_what_is_alone_stays_as_it_is(dtype):
    key = torch.randn(1, 1, 6, 8).to(dtype)
    key[0, 0, 2, 3], key[0, 0, 4, 1] = NAN, INF
    bias = torch.rand(1, 1, 6)
    runs = similar_runs(key, torch.tensor([6]), threshold=0.999)
    assert runs.tolist() == [[list(range(6))]]
    merged, value, size = merge_runs(key, key.clone(), runs, key_bias=bias)
    assert merged.dtype == dtype
    assert size.dtype == torch.float32
    for ours, expected in ((merged, key), (value, key), (size, bias)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_merge():
    key = torch.randn(2, 1, 0, 4)
    runs = similar_runs(key, torch.tensor([0, 0]), threshold=0.5)
    assert merge_runs(key, key, runs)[0].shape == (2, 1, 0, 4)
    absent = torch.full((2, 1, 3), -1)
    assert merge_runs(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4), absent)[2].numel() == 0


LAYERS, HEADS, DIM, SIZE = 2, 2, 8, 4


def repeated(groups, rows=2, blocks=30, **options):
    """A cache whose tokens come in runs of equal keys and values, other runs in every head."""
    pool = BlockPool(
        blocks,
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        block_size=SIZE,
        dtype=torch.float32,
        key_bias=True,
        **options,
    )
    cache = PagedKVCache(pool, rows)
    tokens = sum(groups)
    for layer in range(LAYERS):
        fresh = torch.randn(2, rows, HEADS, len(groups), DIM)
        index = [torch.tensor(groups).roll(layer + h) for h in range(HEADS)]
        index = torch.stack([torch.arange(len(groups)).repeat_interleave(n) for n in index])
        index = index[None, None, :, :, None].expand(2, rows, HEADS, tokens, DIM)
        cache.append(layer, *fresh.gather(3, index).unbind())
    return cache


def attend(cache, query, layer):
    pool = cache.pool
    return paged_attention(
        query,
        pool.key_pages[layer],
        pool.value_pages[layer],
        cache.block_table,
        cache.seq_lens,
        key_bias=pool.key_bias[layer],
        return_lse=True,
    )


def test_equal_tokens_merge_without_a_trace():
    cache = repeated([1, 5, 2, 1, 7, 3])
    query = torch.randn(LAYERS, 2, 4, 1, DIM)
    before = [attend(cache, query[layer], layer) for layer in range(LAYERS)]
    merge_similar_(cache, threshold=0.99)
    assert cache.seq_lens.tolist() == [6, 6]
    assert cache.pool.num_free_blocks == 30 - 4
    for layer in range(LAYERS):
        for ours, expected in zip(attend(cache, query[layer], layer), before[layer], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    j = torch.arange(6)
    for row in range(2):  # nobody is lost
        size = cache.pool.key_bias[:, cache.block_table[row, j // SIZE].long(), :, j % SIZE].exp()
        torch.testing.assert_close(size.sum(0), torch.full((LAYERS, HEADS), 19.0))


def test_heads_with_fewer_runs_hide_their_rest_and_merging_goes_on():
    cache = repeated([4, 4, 4])
    pool = cache.pool
    pool.key_pages[0, :, 1] = torch.randn(30, SIZE, DIM)  # nothing is alike in one head
    query = torch.randn(LAYERS, 2, 4, 1, DIM)
    before = [attend(cache, query[layer], layer) for layer in range(LAYERS)]
    merge_similar_(cache, threshold=0.99)
    assert cache.seq_lens.tolist() == [12, 12]
    assert (pool.key_bias == -INF).any()
    for layer in range(LAYERS):
        for ours, expected in zip(attend(cache, query[layer], layer), before[layer], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    # Two new tokens, equal to each other; the hidden ones disappear when the head allows it.
    for layer in range(LAYERS):
        token = torch.randn(2, 2, HEADS, 1, DIM).expand(-1, -1, -1, 2, -1).contiguous()
        cache.append(layer, *token.unbind())
    pool.key_pages[0, :, 1] = 1.0
    before = attend(cache, query[1], 1)
    merge_similar_(cache, threshold=0.99)
    assert cache.seq_lens.tolist() == [4, 4]
    for ours, expected in zip(attend(cache, query[1], 1), before, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_merging_similar_tokens_changes_attention_little():
    torch.manual_seed(1)
    cache = repeated([6, 6, 6, 6])
    pool = cache.pool
    pool.key_pages += 0.05 * torch.randn_like(pool.key_pages)
    pool.value_pages += 0.05 * torch.randn_like(pool.value_pages)
    query = torch.randn(2, 4, 1, DIM)
    before, _ = attend(cache, query, 1)
    mass = torch.stack(
        [
            attention_mass(query, pool.key_pages[i], cache.block_table, cache.seq_lens)
            for i in range(LAYERS)
        ]
    )
    merge_similar_(cache, threshold=0.95, mass=mass, recent=2)
    assert cache.seq_lens.max() < 12
    after, _ = attend(cache, query, 1)
    pages = pool.key_pages[1], pool.value_pages[1], cache.block_table, cache.seq_lens
    unbiased = reference.paged_attention(query, *pages)
    assert (after - before).norm() < 0.1 * before.norm()
    assert (after - before).norm() < (unbiased - before).norm()


def test_shared_blocks_and_summaries():
    cache = repeated([1] * 7 + [6], summaries="minmax")
    pool = cache.pool
    twin = cache.fork([0, 1])
    pages = [pool.key_pages.clone(), pool.value_pages.clone(), pool.key_bias.clone()]
    table = cache.block_table.clone().long()
    merge_similar_(twin, threshold=0.999)
    assert torch.equal(cache.block_table.long(), table)
    for now, then in zip((pool.key_pages, pool.value_pages, pool.key_bias), pages, strict=True):
        assert torch.equal(now[:, table], then[:, table])
    assert twin.seq_lens.tolist() == [8, 8]
    for layer in range(LAYERS):
        ours = pool.summaries[layer][twin.block_table.long()].transpose(1, 2)
        exact = block_summaries(pool.key_pages[layer], twin.block_table, twin.seq_lens)
        assert torch.equal(ours, exact)


def test_exhaustion_changes_nothing():
    cache = repeated([6, 6], blocks=7)
    twin = cache.fork([0, 1])
    table = twin.block_table.clone()
    pages = twin.pool.key_pages.clone()
    with pytest.raises(BlockPoolExhausted):
        merge_similar_(twin, threshold=0.9)
    assert torch.equal(twin.block_table, table)
    assert torch.equal(twin.pool.key_pages, pages)
    assert twin.seq_lens.tolist() == [12, 12]


def test_rows_of_any_length():
    cache = repeated([3, 3], rows=3)
    cache.truncate_([6, 0, 4])
    merge_similar_(cache, threshold=0.9, recent=1)
    assert cache.seq_lens.tolist() == [3, 0, 2]
    cache.truncate_([0, 0, 0])
    merge_similar_(cache, threshold=0.9)
    assert cache.pool.num_free_blocks == 30
    merge_similar_(cache.fork([]), threshold=0.9)


def test_errors_name_the_argument():
    cache = repeated([2, 2])
    plain = BlockPool(4, num_layers=1, num_kv_heads=1, head_dim=2, dtype=torch.float32)
    with pytest.raises(ValueError, match="cache: expected a pool made with key_bias=True"):
        merge_similar_(PagedKVCache(plain, 1), threshold=0.9)
    with pytest.raises(ValueError, match="cache: expected a PagedKVCache, got BlockPool"):
        merge_similar_(plain, threshold=0.9)
    with pytest.raises(
        ValueError, match=r"mass: expected .* = \(2, 2, 2, N\) with N of at least 4"
    ):
        merge_similar_(cache, threshold=0.9, mass=torch.rand(2, 2, 2, 3))
    with pytest.raises(ValueError, match="recent: expected at least 0, got -1"):
        merge_similar_(cache, threshold=0.9, recent=-1)
    cache.append(1, *torch.randn(2, 2, HEADS, 1, DIM).unbind())
    with pytest.raises(ValueError, match="every layer must have stored the same tokens"):
        merge_similar_(cache, threshold=0.9)
    key = torch.randn(1, 1, 3, 2)
    with pytest.raises(ValueError, match=r"runs: expected \(B, Hkv, N\) like key.*got \(1, 1, 2\)"):
        merge_runs(key, key, torch.zeros(1, 1, 2).long())
    with pytest.raises(ValueError, match=r"expected \(B, Hkv, N, D\) and \(B,\)"):
        similar_runs(key, torch.tensor([3, 3]), threshold=0.5)

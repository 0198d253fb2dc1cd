"""Quantised pages whose tokens are weighed, dropped and merged: what moves is quantised anew."""

from __future__ import annotations

import pytest
import torch

from torch_winnow import reference
from torch_winnow.kvcache import (
    BlockPool,
    BlockPoolExhausted,
    PagedKVCache,
    attention_mass,
    block_summaries,
    merge_similar_,
    paged_attention,
    snapkv_positions,
)

LAYERS, HEADS, DIM, SIZE = 2, 2, 6, 4
CODES = (torch.int8, torch.float8_e4m3fn)
codes = pytest.mark.parametrize("code", CODES, ids=["int8", "float8"])


def make_pool(code, blocks=24, **options):
    return BlockPool(
        blocks, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, block_size=SIZE,
        dtype=code, **options,
    )  # fmt: skip


def filled(pool, *lengths):
    """Blocks of very different magnitudes, and what was stored."""
    cache = PagedKVCache(pool, len(lengths))
    loudness = 10.0 ** ((torch.arange(max(lengths)) // SIZE) % 3 - 1)
    key, value = torch.randn(2, LAYERS, len(lengths), HEADS, max(lengths), DIM)
    key, value = key * loudness[:, None], value * loudness[:, None]
    for layer in range(LAYERS):
        cache.append(layer, key[layer], value[layer], lengths=lengths)
    return cache, (key, value)


def numbers(cache, row):
    """(num_layers, Hkv, n, D) keys and values of a row, and the scale of each."""
    pool, j = cache.pool, torch.arange(int(cache.seq_lens[row]))
    block = cache.block_table[row, j // SIZE].long()
    result = []
    for pages, scales in (
        (pool.key_pages, pool.key_scales),
        (pool.value_pages, pool.value_scales),
    ):
        scale = scales[:, block].transpose(1, 2)[..., None]
        tokens = pages[:, block, :, j % SIZE].float().permute(1, 2, 0, 3)
        result.append((tokens * scale, scale))
    return result


@codes
@pytest.mark.parametrize("shape", ["shared", "heads", "layers"])
def test_compaction(code, shape):
    pool = make_pool(code, summaries="minmax", key_bias=True)
    cache, _ = filled(pool, 15, 8, 0)
    twin = cache.fork([0, 1, 2, 0])
    before = [numbers(cache, row) for row in range(3)]
    keep = torch.full((LAYERS, 4, HEADS, 7), -1)
    for layer in range(LAYERS):
        for row, (length, count) in enumerate([(15, 7), (8, 3), (0, 0), (15, 5)]):
            for head in range(HEADS):
                keep[layer, row, head, :count] = torch.randperm(length)[:count].sort().values
    keep = {"shared": keep[0, :, 0], "heads": keep[0], "layers": keep}[shape]
    twin.compact_(keep)
    assert twin.seq_lens.tolist() == [7, 3, 0, 5]
    full = keep.view(LAYERS if shape == "layers" else 1, 4, -1, 7).expand(LAYERS, -1, HEADS, -1)
    for row in range(3):  # the forks' parent is as it was
        for (ours, scale), (expected, expected_scale) in zip(
            numbers(cache, row), before[row], strict=True
        ):
            assert torch.equal(ours, expected)
            assert torch.equal(scale, expected_scale)
    for row, parent in enumerate([0, 1, 2, 0]):
        index = full[:, row, :, : int(twin.seq_lens[row]), None].expand(-1, -1, -1, DIM)
        for (ours, scale), (source, _) in zip(numbers(twin, row), before[parent], strict=True):
            expected = source.gather(2, index)
            step = scale / 2 if code == torch.int8 else expected.abs() / 16 + scale / 1024
            assert (ours - expected).abs().le(step * 1.0001).all()
    for layer in range(LAYERS):
        exact = block_summaries(
            pool.key_pages[layer], twin.block_table, twin.seq_lens, "minmax",
            key_scales=pool.key_scales[layer],
        )  # fmt: skip
        held = twin.block_table >= 0
        ours = pool.summaries[layer][twin.block_table.clamp(min=0).long()]
        assert torch.equal(ours[held], exact.transpose(1, 2)[held])


@codes
def test_blocks_begin_anew(code):
    """Nothing is left of louder tokens that are gone."""
    pool = make_pool(code)
    cache, _ = filled(pool, 12)
    quiet = pool.key_scales[:, int(cache.block_table[0, 0])].clone()
    assert (pool.key_scales[:, int(cache.block_table[0, 2])] > 8 * quiet).all()
    cache.compact_(torch.tensor([[0, 1, 2, 3, 8, 9]]))
    cache.compact_(torch.tensor([[4, 5]]))  # loud ones in the place of quiet ones
    assert (pool.key_scales[:, int(cache.block_table[0, 0])] > 4 * quiet).all()
    cache, _ = filled(pool, 16)  # a quiet block at the end
    cache.compact_(torch.tensor([[12, 13, 14, 15]]))
    assert (pool.key_scales[:, int(cache.block_table[0, 0])] < 4 * quiet).all()


@codes
def test_what_stays_keeps_its_codes(code):
    pool = make_pool(code)
    cache, _ = filled(pool, 14)
    pages = pool.key_pages.view(torch.uint8).clone()
    cache.compact_(torch.arange(14)[None])
    cache.compact_(torch.arange(9)[None])
    assert torch.equal(pool.key_pages.view(torch.uint8), pages)
    cache.compact_(torch.tensor([[0, 1, 2, 3, 4, 5, 8] + 9 * [-1]]))  # wider than the table
    block = int(cache.block_table[0, 0])
    assert torch.equal(pool.key_pages.view(torch.uint8)[:, block], pages[:, block])


@codes
def test_exhaustion_changes_nothing(code):
    pool = make_pool(code, blocks=4)
    cache, _ = filled(pool, 15)
    twin = cache.fork([0])
    before = numbers(twin, 0)
    with pytest.raises(BlockPoolExhausted):
        twin.compact_(torch.tensor([[1, 2, 3]]))
    for (ours, scale), (expected, expected_scale) in zip(numbers(twin, 0), before, strict=True):
        assert torch.equal(ours, expected)
        assert torch.equal(scale, expected_scale)


@codes
def test_merging_keeps_attention(code):
    """Equal tokens merge into one, which stands for all of them."""
    pool = make_pool(code, key_bias=True, summaries="mean")
    cache = PagedKVCache(pool, 1)
    tokens = torch.randn(2, LAYERS, 1, HEADS, 6, DIM).repeat_interleave(3, dim=4)
    for layer in range(LAYERS):
        cache.append(layer, *tokens[:, layer])
    other = cache.fork([0])
    query = torch.randn(LAYERS, 1, 4, 1, DIM)

    def attend(layer, cache):
        return paged_attention(
            query[layer], pool.key_pages[layer], pool.value_pages[layer], cache.block_table,
            cache.seq_lens, key_bias=pool.key_bias[layer],
            key_scales=pool.key_scales[layer], value_scales=pool.value_scales[layer],
        )  # fmt: skip

    before = [attend(layer, cache) for layer in range(LAYERS)]
    merge_similar_(cache, threshold=0.98)
    assert cache.seq_lens.tolist() == [6]
    for layer in range(LAYERS):
        error = 0.05 if code == torch.int8 else 0.15
        assert (attend(layer, cache) - before[layer]).norm() < error * before[layer].norm()
        assert torch.equal(attend(layer, other), before[layer])
        exact = block_summaries(
            pool.key_pages[layer], cache.block_table, cache.seq_lens, "mean",
            key_scales=pool.key_scales[layer],
        )  # fmt: skip
        ours = pool.summaries[layer][cache.block_table.long()].transpose(1, 2)
        torch.testing.assert_close(ours, exact)


@codes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mass(code, dtype):
    pool = make_pool(code, key_bias=True)
    cache, _ = filled(pool, 15, 8, 0)
    forks = cache.fork([0, 0, 1, 2])
    query = torch.randn(4, 4, 3, DIM).to(dtype)
    call = query, pool.key_pages[0], forks.block_table, forks.seq_lens
    bias = torch.randn(pool.key_bias[0].shape)
    for options in ({}, {"window": 5, "sinks": 2}, {"causal": False, "key_bias": bias}):
        options["key_scales"] = pool.key_scales[0]
        expected = reference.attention_mass(*call, **options)
        torch.testing.assert_close(attention_mass(*call, **options), expected, rtol=1e-4, atol=1e-5)
        _, lse = paged_attention(
            query, pool.key_pages[0], pool.value_pages[0], *call[2:],
            value_scales=pool.value_scales[0], return_lse=True, **options,
        )  # fmt: skip
        given = attention_mass(*call, lse=lse, **options)
        torch.testing.assert_close(given, expected, rtol=2e-3, atol=1e-3)
    compiled = torch.compile(attention_mass, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*call, **options), attention_mass(*call, **options))
    keep = snapkv_positions(expected[:2], forks.seq_lens[:2], capacity=8, window=3)
    pair = forks.fork([0, 1])
    pair.compact_(keep)
    assert pair.seq_lens.tolist() == [8, 8]


def test_mass_names_what_is_wrong():
    pool = make_pool(torch.int8)
    cache, _ = filled(pool, 5)
    query, pages, scales = torch.randn(1, 2, 1, DIM), pool.key_pages[0], pool.key_scales[0]
    table = cache.block_table, cache.seq_lens
    for call, message in [
        ((query, pages, None), "key_scales: expected those of quantised .* got None"),
        ((query, pages.float(), scales), "key_scales: .* None of others, got a tensor"),
        ((query.double(), pages, scales), "query: expected float32, .* got float64"),
        ((query, pages, scales[0]), r"key_scales: expected .*\(24, 2\) float32"),
        ((query, pages, scales.double()), "key_scales: .* of torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention_mass(*call[:2], *table, key_scales=call[2])
    wrong = cache.block_table + 24
    with pytest.raises(ValueError, match="block_table: expected 0 <= block"):
        attention_mass(query, pages, wrong, cache.seq_lens, key_scales=scales)

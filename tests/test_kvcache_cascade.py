"""Rows that share blocks go through them together; the result is bit for bit that of copies."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.kvcache import BlockPool, PagedKVCache, paged_attention

KEY_HEADS, DIM, BLOCK = 2, 32, 16

# Per row: the family whose beginning it shares, how many blocks of it, and its length.
ROWS = [
    (0, 70, 1300),
    (1, 20, 700),
    (0, 70, 1121),  # ends in the block where it leaves the family
    (0, 3, 900),
    (1, 20, 320),  # nothing of its own
    (0, 70, 9),
    (0, 0, 40),  # shares nothing
    (1, 20, 0),
    (0, 81, 1296),
]


def forks(queries: int, dtype: torch.dtype):
    """The rows with shared blocks, and the same rows with a copy of each block for each row."""
    width = 96
    count = len(ROWS)
    shared = torch.randperm(2 * width + count * width).int()
    families, own = shared[: 2 * width].view(2, width), shared[2 * width :].view(count, width)
    table = own.clone()
    for row, (family, blocks, _) in enumerate(ROWS):
        table[row, :blocks] = families[family, :blocks]
    lengths = torch.tensor([length for *_, length in ROWS], dtype=torch.int32)
    key = torch.randn(len(shared), KEY_HEADS, BLOCK, DIM).to(dtype)
    value = torch.randn(len(shared), KEY_HEADS, BLOCK, DIM).to(dtype)
    bias = torch.randn(len(shared), KEY_HEADS, BLOCK)
    bias[torch.rand_like(bias) < 0.1] = -torch.inf
    query = torch.randn(count, 3 * KEY_HEADS, queries, DIM).to(dtype)
    places = torch.randperm(count * width)
    copies = []
    for pages in (key, value, bias):
        copy = torch.empty(count * width, *pages.shape[1:], dtype=pages.dtype)
        copy[places] = pages[table.flatten().long()]
        copies.append(copy)
    return (
        (query, key, value, table, lengths),
        (query, *copies[:2], places.int().view(count, width), lengths),
        (bias, copies[2]),
    )


def same(together, apart) -> None:
    for shared, copied in zip(together, apart, strict=True):
        assert torch.equal(shared, copied)


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 200, "sinks": 20}, {"causal": False}, {"window": 3}, {"key_bias": True}],
    ids=str,
)
def test_forks_equal_copies(queries, options, dtype, cpu_capability):
    shared, copied, biases = forks(queries, dtype)
    first, second = [
        {**options, **({"key_bias": bias} if "key_bias" in options else {})} for bias in biases
    ]
    same(
        paged_attention(*shared, return_lse=True, **first),
        paged_attention(*copied, return_lse=True, **second),
    )


@pytest.mark.parametrize("choice", ["one for all", "per row", "per key head"])
def test_forks_equal_copies_on_chosen_blocks(choice, dtype, cpu_capability):
    shared, copied, biases = forks(2, dtype)
    counts = -(-shared[4] // BLOCK)
    named = torch.arange(96, dtype=torch.int32).expand(len(ROWS), KEY_HEADS, -1)
    dropped = torch.rand(named.shape) < 0.3
    if choice == "one for all":
        dropped = dropped[:1, :1]
    named = torch.where(dropped | (named >= counts[:, None, None]), -1, named)
    if choice != "per key head":
        named = named[:, 0]
    same(
        paged_attention(*shared, block_indices=named, key_bias=biases[0], return_lse=True),
        paged_attention(*copied, block_indices=named, key_bias=biases[1], return_lse=True),
    )


def test_company_and_threads_change_nothing(dtype, on_thread_counts):
    """Which rows go together depends on the batch and the threads; no bit of a result does."""
    inputs, _, _ = forks(1, dtype)
    query, key, value, table, lengths = inputs
    results = on_thread_counts(lambda: paged_attention(*inputs))
    for row in range(len(ROWS)):
        part = slice(row, row + 1)
        alone = paged_attention(query[part], key, value, table[part], lengths[part])
        for result in results:
            assert torch.equal(result[part], alone)


def test_more_forks_than_go_together(dtype):
    """90 forks of one row, against the definition."""
    query = torch.randn(90, 2, 1, DIM).to(dtype)
    pages = torch.randn(2, 95, 1, BLOCK, DIM).to(dtype)
    table = torch.cat([torch.arange(5).expand(90, 5), torch.arange(5, 95)[:, None]], 1).int()
    lengths = torch.arange(90, dtype=torch.int32) % 91
    result = paged_attention(query, *pages, table, lengths)
    expected = reference.paged_attention(query.double(), *pages.double(), table, lengths)
    torch.testing.assert_close(result.double(), expected, **TOLERANCE[dtype])


def test_a_cache_that_forks():
    """The tables that a cache hands out; the last block is copied on the first append."""
    pool = BlockPool(32, num_layers=1, num_kv_heads=2, head_dim=DIM, dtype=torch.float32)
    cache = PagedKVCache(pool, 1)
    tokens = torch.randn(2, 1, 2, 2 * pool.block_size + 5, DIM)
    cache.append(0, *tokens)
    particles = cache.fork([0] * 6)
    step = torch.randn(2, 6, 2, 1, DIM)
    particles.append(0, *step)
    query = torch.randn(6, 4, 1, DIM)
    pages = pool.key_pages[0], pool.value_pages[0]
    out = paged_attention(query, *pages, particles.block_table, particles.seq_lens)
    dense = torch.cat([tokens.expand(-1, 6, -1, -1, -1), step], 3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *dense, enable_gqa=True)
    torch.testing.assert_close(out, expected)

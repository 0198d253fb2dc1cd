"""Paged attention, writes and block copies on the GPU, against their definitions."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import kvcache, reference

INF = float("inf")


def pages(gpu, dtype, *, lengths, key_heads, head_dim, value_dim=None, block_size=4, spare=2):
    """Pages with scattered blocks, a table with -1 behind the used blocks, and the lengths. Pages
    that no sequence uses hold NaN, and so do the slots behind a sequence's end."""
    used = [-(-length // block_size) for length in lengths]
    count = sum(used) + spare
    key = torch.full((count, key_heads, block_size, head_dim), torch.nan, dtype=dtype)
    value = torch.full(
        (count, key_heads, block_size, value_dim or head_dim), torch.nan, dtype=dtype
    )
    table = torch.full((len(lengths), max(used) + 1), -1, dtype=torch.int32)
    free = torch.randperm(count).tolist()
    for row, length in enumerate(lengths):
        for i in range(used[row]):
            block = free.pop()
            table[row, i] = block
            n = min(block_size, length - i * block_size)
            key[block, :, :n] = torch.randn(key_heads, n, key.shape[-1]).to(dtype)
            value[block, :, :n] = torch.randn(key_heads, n, value.shape[-1]).to(dtype)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return tuple(t.to(gpu) for t in (key, value, table, seq_lens))


def check(query, arguments, dtype, **options):
    out, lse = kvcache.paged_attention(query, *arguments, return_lse=True, **options)
    key, value, table, seq_lens = arguments
    wide = {
        name: option.double() if name == "key_bias" else option for name, option in options.items()
    }
    expected, expected_lse = reference.paged_attention(
        query.double(), key.double(), value.double(), table, seq_lens, return_lse=True, **wide
    )
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    torch.testing.assert_close(lse.double(), expected_lse, **TOLERANCE[wide_dtype])
    assert out.dtype == dtype
    assert lse.dtype == wide_dtype
    return out, lse


@pytest.mark.parametrize(
    ("head_dim", "group"), [(1, 1), (20, 3), (64, 8), (72, 3), (128, 5), (256, 2)]
)
def test_decode(gpu, dtype, head_dim, group):
    arguments = pages(gpu, dtype, lengths=[1, 9, 16], key_heads=2, head_dim=head_dim)
    query = torch.randn(3, 2 * group, 1, head_dim, device=gpu).to(dtype)
    check(query, arguments, dtype)


def test_double(gpu):
    arguments = pages(gpu, torch.float64, lengths=[7], key_heads=1, head_dim=33)
    check(torch.randn(1, 2, 2, 33, device=gpu).double(), arguments, torch.float64)


@pytest.mark.parametrize("queries", [2, 7])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 2, "sinks": 2}], ids=str)
def test_prefill(gpu, dtype, queries, causal, options):
    arguments = pages(gpu, dtype, lengths=[11, 23], key_heads=2, head_dim=16)
    query = torch.randn(2, 6, queries, 16, device=gpu).to(dtype)
    check(query, arguments, dtype, causal=causal, **options)


def test_queries_beyond_the_sequence_see_nothing(gpu):
    arguments = pages(gpu, torch.float32, lengths=[2, 0], key_heads=1, head_dim=8)
    out, lse = check(torch.randn(2, 1, 4, 8, device=gpu), arguments, torch.float32)
    assert (out[1] == 0).all()
    assert (lse[1] == -INF).all()
    assert (lse[0, 0, :2] == -INF).all()


@pytest.mark.parametrize("value_dim", [5, 8, 128])
def test_values_of_another_size(gpu, dtype, value_dim):
    arguments = pages(gpu, dtype, lengths=[13], key_heads=1, head_dim=64, value_dim=value_dim)
    check(torch.randn(1, 2, 1, 64, device=gpu).to(dtype), arguments, dtype)


@pytest.mark.parametrize("block_size", [1, 5, 64, 300])
def test_splits_and_block_sizes(gpu, block_size):
    arguments = pages(
        gpu, torch.float32, lengths=[700, 30], key_heads=1, head_dim=8, block_size=block_size
    )
    check(torch.randn(2, 3, 1, 8, device=gpu), arguments, torch.float32)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("long", [False, True])
def test_block_lists(gpu, per_head, long):
    length, k = (700, 90) if long else (40, 4)
    arguments = pages(gpu, torch.float32, lengths=[length, 40], key_heads=2, head_dim=8)
    heads = (2,) if per_head else ()
    chosen = torch.full((2, *heads, k), -1, dtype=torch.int32)
    for row, blocks in enumerate((length // 4, 10)):
        for h in range(2 if per_head else 1):
            at = (row, h) if per_head else (row,)
            picked = torch.randperm(blocks)[: k - 1].sort().values
            chosen[at][: len(picked)] = picked.to(torch.int32)
    check(
        torch.randn(2, 4, 2, 8, device=gpu), arguments, torch.float32, block_indices=chosen.to(gpu)
    )
    nothing = torch.full_like(chosen, -1).to(gpu)
    out, lse = check(
        torch.randn(2, 4, 1, 8, device=gpu), arguments, torch.float32, block_indices=nothing
    )
    assert (lse == -INF).all()
    assert (out == 0).all()


@pytest.mark.parametrize("shape", ["full", "head", "slot"])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_key_bias(gpu, shape, bias_dtype):
    arguments = pages(gpu, torch.float32, lengths=[19], key_heads=2, head_dim=8)
    blocks, key_heads, block_size, _ = arguments[0].shape
    sizes = {"full": (blocks, key_heads, block_size), "head": (key_heads, 1), "slot": (block_size,)}
    bias = torch.randn(sizes[shape]).to(gpu, bias_dtype)
    bias[..., 0] = -INF
    check(torch.randn(1, 4, 1, 8, device=gpu), arguments, torch.float32, key_bias=bias)


def test_a_nan_that_is_seen_stays_one(gpu):
    key, value, table, seq_lens = pages(gpu, torch.float32, lengths=[600], key_heads=1, head_dim=8)
    key[table[0, 3], 0, 1, 0] = torch.nan
    out, lse = kvcache.paged_attention(
        torch.randn(1, 2, 1, 8, device=gpu), key, value, table, seq_lens, return_lse=True
    )
    assert out.isnan().all()
    assert lse.isnan().all()


def test_strided_pages_and_placement(gpu, on_every_order):
    arguments = pages(gpu, torch.bfloat16, lengths=[300, 45], key_heads=2, head_dim=64)
    query = torch.randn(2, 8, 1, 64, device=gpu).to(torch.bfloat16)
    expected = kvcache.paged_attention(query, *arguments)
    results = on_every_order(lambda: kvcache.paged_attention(query, *arguments))
    assert all(torch.equal(result, expected) for result in results)
    key, value, table, seq_lens = arguments
    order = torch.randperm(key.shape[0], device=gpu)
    inverse = torch.argsort(order).to(torch.int32)
    moved = torch.where(table >= 0, inverse[table.long().clamp(min=0)], table)
    wide = torch.zeros(key.shape[0], 2, 4, 200, dtype=key.dtype, device=gpu)
    wide[..., 8:72], wide[..., 80:144] = key[order], value[order]
    result = kvcache.paged_attention(query, wide[..., 8:72], wide[..., 80:144], moved, seq_lens)
    assert torch.equal(result, expected)


def test_a_foreign_block_is_never_read(gpu):
    key, value, table, seq_lens = pages(gpu, torch.float32, lengths=[9], key_heads=1, head_dim=8)
    table[0, 1] = 10_000
    arguments = (torch.randn(1, 1, 1, 8, device=gpu), key, value, table, seq_lens)
    assert kvcache.paged_attention(*arguments).isfinite().all()
    kvcache.paged_attention(*arguments[:-1], seq_lens + 1_000_000)  # the emulator would object


def test_empty(gpu):
    arguments = pages(gpu, torch.float32, lengths=[4], key_heads=1, head_dim=8)
    assert kvcache.paged_attention(torch.randn(1, 1, 0, 8, device=gpu), *arguments).shape[2] == 0


def test_errors_name_the_argument(gpu):
    key, value, table, seq_lens = pages(gpu, torch.float32, lengths=[9], key_heads=2, head_dim=8)
    query = torch.randn(1, 3, 1, 8, device=gpu)
    with pytest.raises(ValueError, match=r"query: expected a number of heads divisible"):
        kvcache.paged_attention(query, key, value, table, seq_lens)
    with pytest.raises(ValueError, match=r"block_table: expected int32"):
        kvcache.paged_attention(query[:, :2], key, value, table.long(), seq_lens)


@pytest.mark.parametrize("head_dim", [1, 7, 64])
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_writes(gpu, head_dim, wide):
    def values(*shape):
        return (torch.randn(shape) * 50).to(gpu, wide)

    key_pages, value_pages = values(6, 2, 4, head_dim), values(6, 2, 4, 2 * head_dim)
    table = torch.tensor([[5, 2, -1], [0, 3, 1]], dtype=torch.int32, device=gpu)
    positions = torch.tensor([[0, 7, -1], [11, 2, 99]], device=gpu)
    key, value = values(2, 3, 2, head_dim).transpose(1, 2), values(2, 2, 3, 2 * head_dim)
    expected_key, expected_value = key_pages.clone(), value_pages.clone()
    for row, t, block, slot in ((0, 0, 5, 0), (0, 1, 2, 3), (1, 0, 1, 3), (1, 1, 0, 2)):
        expected_key[block, :, slot] = key[row, :, t]
        expected_value[block, :, slot] = value[row, :, t]
    torch.ops.winnow.paged_write_(key_pages, value_pages, key, value, table, positions)
    assert torch.equal(key_pages, expected_key)
    assert torch.equal(value_pages, expected_value)


@pytest.mark.parametrize("head_dim", [3, 16])
def test_block_copies(gpu, head_dim):
    key_pages, value_pages = torch.randn(2, 2, 6, 2, 4, head_dim, device=gpu)
    source, target = torch.tensor([[1, 4], [0, 5]], device=gpu)
    expected = key_pages.clone(), value_pages.clone()
    for tensor in expected:
        tensor[:, target] = tensor[:, source]
    torch.ops.winnow.copy_blocks_(key_pages, value_pages, source, target)
    assert torch.equal(key_pages, expected[0])
    assert torch.equal(value_pages, expected[1])

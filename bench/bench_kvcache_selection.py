"""Choosing blocks, the attention that keys receive, and compaction, against compositions of torch.

The limit is the bytes that each must read over the read bandwidth of the same run.
"""

from __future__ import annotations

import functools

import pytest
import torch

from torch_winnow import reference
from torch_winnow.kvcache import (
    BlockPool,
    PagedKVCache,
    attention_mass,
    block_summaries,
    paged_attention,
    score_blocks,
    score_select_blocks,
    select_blocks,
)

HEADS, KEY_HEADS, DIM, BLOCK = 32, 8, 128, 64
GROUP = HEADS // KEY_HEADS


def composed_choice(query, summaries, table, k):
    """Quest in torch: gather the summaries, bound, top-k; the first and last block always."""
    low, high = summaries[table].transpose(1, 2).unbind(3)
    packed = query.view(len(query), KEY_HEADS, GROUP, 1, DIM)
    bound = torch.maximum(packed * low[:, :, None], packed * high[:, :, None])
    scores = bound.sum(-1).amax(2)
    scores[:, :, 0] = scores[:, :, -1] = torch.inf
    return scores.topk(k).indices.sort(-1).values.int()


@pytest.mark.parametrize("impl", ["winnow", "score, then select", "torch", "torch.compile"])
@pytest.mark.parametrize(("batch", "length"), [(4, 32768), (1, 131072)])
def test_choose_blocks(measure, batch, length, impl):
    """A tenth of the blocks for one step, from the summaries of a pool."""
    count = length // BLOCK
    k = count // 10
    summaries = torch.randn(batch * count, KEY_HEADS, 2, DIM).sort(2).values
    table = torch.randperm(batch * count).int().view(batch, count)
    lengths = torch.full((batch,), length, dtype=torch.int32)
    query = torch.randn(batch, HEADS, 1, DIM)
    options = {"seq_lens": lengths, "block_size": BLOCK}

    def fused(query, summaries):
        return score_select_blocks(query, summaries, k, block_table=table, **options)

    def in_turn(query, summaries):
        return select_blocks(score_blocks(query, summaries, table), k, **options)

    def composed(query, summaries):
        return composed_choice(query, summaries, table.long(), k)

    function = {"winnow": fused, "score, then select": in_turn, "torch": composed}.get(impl)
    if function is None:
        function = torch.compile(composed)
    # Sums in another order may swap two blocks that are all but equal.
    same = function(query, summaries) == fused(query, summaries)
    assert same.float().mean() > 0.99
    measure(
        f"score_select_blocks {batch}x{length}",
        impl,
        function,
        inputs=[(query, summaries)],
        moved_bytes=summaries.nbytes,
        rounds=7,
    )


@pytest.mark.parametrize("impl", ["winnow", "block_summaries of all"])
def test_keep_summaries(measure, impl):
    """After a token of each of 16 rows: the blocks it touched, against making all afresh."""
    length = 4096
    count = length // BLOCK
    pages = torch.randn(16 * count, KEY_HEADS, BLOCK, DIM)
    table = torch.randperm(16 * count).int().view(16, count)
    lengths = torch.full((16,), length, dtype=torch.int32)
    summaries = torch.zeros(16 * count, KEY_HEADS, 2, DIM)
    positions = torch.full((16, 1), length - 1)

    def update():
        torch.ops.winnow.update_block_summaries_(summaries, pages, table, lengths, positions)
        return summaries

    if impl == "winnow":
        function = update
        expected = block_summaries(pages, table[:, -1:], lengths * 0 + BLOCK)
        assert torch.equal(update()[table[:, -1].long()], expected[:, :, 0])
    else:

        def function():
            return block_summaries(pages, table, lengths)

    measure(
        "update_block_summaries_ 16x4096",
        impl,
        function,
        moved_bytes=16 * KEY_HEADS * BLOCK * DIM * 4,
        rounds=7,
    )


def composed_mass(query, key):
    """The column sums of the softmax, of dense keys; heads of a group packed."""
    batch, _, queries, _ = query.shape
    length = key.shape[2]
    packed = query.view(batch, KEY_HEADS, GROUP * queries, DIM)
    scores = (packed @ key.transpose(2, 3)) * DIM**-0.5
    i = torch.arange(length - queries, length).repeat(GROUP)
    hidden = torch.arange(length) > i[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32).sum(2)


@pytest.mark.parametrize("impl", ["winnow", "winnow, lse given", "torch", "torch.compile"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("queries", [1, 32])
def test_attention_mass(measure, queries, dtype, impl):
    """A step of decoding (H2O), and the observation window of a prompt (SnapKV)."""
    length = 8192
    count = length // BLOCK
    pages = torch.randn(count, KEY_HEADS, BLOCK, DIM, dtype=getattr(torch, dtype))
    table = torch.randperm(count).int().view(1, count)
    lengths = torch.tensor([length], dtype=torch.int32)
    query = torch.randn(1, HEADS, queries, DIM, dtype=pages.dtype)
    if impl.startswith("winnow"):
        inputs = (query, pages, table, lengths)
        _, lse = paged_attention(query, pages, *inputs[1:], return_lse=True)
        options = {} if impl == "winnow" else {"lse": lse}
        function = functools.partial(attention_mass, **options)
    else:
        function = composed_mass if impl == "torch" else torch.compile(composed_mass)
        inputs = (query, pages[table.long()].transpose(1, 2).flatten(2, 3))
    expected = reference.attention_mass(
        query[:, :GROUP].float(), pages[:, :1].float(), table, lengths
    )
    loose = {"rtol": 5e-2, "atol": 1e-3} if dtype == "bfloat16" else {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(function(*inputs)[:, :1].float(), expected, **loose)
    measure(
        f"attention_mass 1x{length}, {queries} queries {dtype}",
        impl,
        function,
        inputs=[inputs],
        moved_bytes=pages.nbytes,
        operations=1.0 * HEADS * queries * length * DIM,
        bf16=dtype == "bfloat16",
        rounds=7,
    )


@pytest.mark.parametrize("impl", ["winnow", "gather"])
def test_compact(measure, impl):
    """A quarter of 4096 tokens, other ones in each head, kept in place or copied to a new cache."""
    length, kept = 4096, 1024
    count = length // BLOCK
    order = torch.rand(1, KEY_HEADS, length).argsort(-1)[..., :kept].sort(-1).values
    if impl == "winnow":
        pool = BlockPool(
            count,
            num_layers=1,
            num_kv_heads=KEY_HEADS,
            head_dim=DIM,
            block_size=BLOCK,
            dtype=torch.float32,
        )
        cache = PagedKVCache(pool, 1)
        key = torch.randn(1, KEY_HEADS, length, DIM)
        cache.append(0, key, key)
        cache.compact_(order)
        expected = key.gather(2, order[..., None].expand(-1, -1, -1, DIM))
        stored = pool.key_pages[0, cache.block_table.long()].transpose(1, 2).flatten(2, 3)
        assert torch.equal(stored, expected)
        table = torch.arange(count).int()[None]

        def function(keep):
            for pages in (pool.key_pages, pool.value_pages):
                torch.ops.winnow.compact_pages_(pages, table, keep[None])
    else:
        key, value = torch.randn(2, 1, KEY_HEADS, length, DIM)

        def function(keep):
            index = keep[..., None].expand(-1, -1, -1, DIM)
            return key.gather(2, index), value.gather(2, index)

    measure(
        f"compact_ 1x{length} to {kept}",
        impl,
        function,
        inputs=[(order,)],
        moved_bytes=2 * kept * KEY_HEADS * DIM * 4,
        rounds=15,
    )

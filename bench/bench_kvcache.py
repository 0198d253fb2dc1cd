"""Attention over pages against SDPA on dense keys, and the choice of blocks against reading all.

The limit is the bytes of keys and values over the read bandwidth of the same run: "of limit" is the
share of that bandwidth that a decode reaches.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from torch_winnow import reference
from torch_winnow.kvcache import (
    BlockPool,
    PagedKVCache,
    block_summaries,
    paged_attention,
    score_blocks,
    select_blocks,
)

HEADS, KEY_HEADS, DIM, BLOCK = 32, 8, 128, 64
GROUP = HEADS // KEY_HEADS
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_call(batch: int, length: int, dtype: torch.dtype, queries: int = 1):
    """Scattered pages, and the same keys and values dense, (B, Hkv, N, D)."""
    count = length // BLOCK
    key_pages = torch.randn(batch * count, KEY_HEADS, BLOCK, DIM, dtype=dtype)
    value_pages = torch.randn(batch * count, KEY_HEADS, BLOCK, DIM, dtype=dtype)
    table = torch.randperm(batch * count).int().view(batch, count)
    lengths = torch.full((batch,), length, dtype=torch.int32)
    query = torch.randn(batch, HEADS, queries, DIM, dtype=dtype)
    return query, key_pages, value_pages, table, lengths


def dense(pages: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return pages[table.long()].transpose(1, 2).flatten(2, 3)


def agrees(result: torch.Tensor, call, **options) -> None:
    """The first row against the definition."""
    query, key_pages, value_pages, table, lengths = call
    first = (query[:1], key_pages, value_pages, table[:1], lengths[:1])
    options = {
        k: v[:1] if isinstance(v, torch.Tensor) and not k.endswith("scales") else v
        for k, v in options.items()
    }
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if query.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(
        result[:1], reference.paged_attention(*first, **options), **tolerance
    )


def quantised(key_pages: torch.Tensor, value_pages: torch.Tensor, dtype: torch.dtype):
    """Pages of codes and their scales, stored block by block."""
    blocks = key_pages.shape[0]
    pages = [torch.zeros_like(x, dtype=dtype) for x in (key_pages, value_pages)]
    scales = [torch.zeros(blocks, KEY_HEADS) for _ in pages]
    torch.ops.winnow.paged_quantise_(
        *pages,
        *scales,
        key_pages,
        value_pages,
        torch.arange(blocks, dtype=torch.int32)[:, None],
        torch.arange(BLOCK).expand(blocks, BLOCK),
    )
    return pages, scales


def sdpa_gqa(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def sdpa_packed(query, key, value):
    """The heads of a group as positions: each key is read once."""
    batch = query.shape[0]
    packed = query.view(batch, KEY_HEADS, GROUP, DIM)
    return F.scaled_dot_product_attention(packed, key, value).view(batch, HEADS, 1, DIM)


@pytest.mark.parametrize("impl", ["winnow", "sdpa_gqa", "sdpa_packed", "gather+sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length"), [(4, 8192), (1, 32768), (4, 32768), (64, 512)])
def test_decode(measure, batch, length, dtype, impl):
    call = make_call(batch, length, DTYPES[dtype])
    query, key_pages, value_pages, table, _ = call
    if impl == "winnow":
        function, inputs = paged_attention, call
    elif impl == "gather+sdpa":

        def function(query, key_pages, value_pages, table, _):
            return sdpa_packed(query, dense(key_pages, table), dense(value_pages, table))

        inputs = call
    else:
        function = sdpa_gqa if impl == "sdpa_gqa" else sdpa_packed
        inputs = (query, dense(key_pages, table), dense(value_pages, table))
    if length <= 8192:
        agrees(function(*inputs), call)
    measure(
        f"paged_attention decode {batch}x{length} {dtype}",
        impl,
        function,
        inputs=[inputs],
        moved_bytes=2 * key_pages.nbytes,
        rounds=7,
    )


@pytest.mark.parametrize("impl", ["winnow", "winnow int8", "winnow float8", "sdpa_packed bfloat16"])
@pytest.mark.parametrize("heads", [8, 32])
@pytest.mark.parametrize(("batch", "length"), [(4, 8192), (1, 32768)])
def test_decode_quantised(measure, batch, length, heads, impl):
    """bfloat16 queries over bfloat16 pages and over codes, whose bytes set the limit of each."""
    query, key_pages, value_pages, table, lengths = make_call(batch, length, torch.bfloat16)
    query = query[:, :: HEADS // heads]
    call = query, key_pages, value_pages, table, lengths
    options, function = {}, paged_attention
    if impl == "sdpa_packed bfloat16":
        call = query, dense(key_pages, table), dense(value_pages, table)

        def function(query, key, value):
            packed = query.view(batch, KEY_HEADS, heads // KEY_HEADS, DIM)
            return F.scaled_dot_product_attention(packed, key, value).view(query.shape)

    elif impl != "winnow":
        dtype = torch.int8 if impl == "winnow int8" else torch.float8_e4m3fn
        pages, scales = quantised(key_pages, value_pages, dtype)
        call = query, *pages, table, lengths
        options = {"key_scales": scales[0], "value_scales": scales[1]}
    if length <= 8192 and impl.startswith("winnow"):
        agrees(function(*call, **options), call, **options)
    measure(
        f"paged_attention quantised {batch}x{length}, {heads} heads",
        impl,
        lambda *inputs: function(*inputs, **options),
        inputs=[call],
        moved_bytes=sum(x.nbytes for x in call[1:3]),
        rounds=9,
    )


@pytest.mark.parametrize("impl", ["winnow", "winnow, all blocks", "gather+sdpa"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.25, 0.1])
def test_selected_blocks(measure, share, dtype, impl):
    """Each key head reads blocks of its own."""
    batch, length = 4, 8192
    call = make_call(batch, length, DTYPES[dtype])
    query, key_pages, value_pages, table, _ = call
    count = int(share * length / BLOCK)
    order = torch.rand(batch, KEY_HEADS, length // BLOCK).argsort(-1)
    chosen = order[..., :count].sort(-1).values.int()

    def attend(*call):
        return paged_attention(*call, block_indices=chosen)

    def gather(query, key_pages, value_pages, table, _):
        heads = torch.arange(KEY_HEADS)[:, None]
        blocks = table.long()[torch.arange(batch)[:, None, None], chosen.long()]
        key, value = (
            key_pages[blocks, heads].flatten(2, 3),
            value_pages[blocks, heads].flatten(2, 3),
        )
        return sdpa_packed(query, key, value)

    function = {"winnow": attend, "winnow, all blocks": paged_attention, "gather+sdpa": gather}[
        impl
    ]
    if impl != "winnow, all blocks":
        agrees(function(*call), call, block_indices=chosen)
    measure(
        f"paged_attention {share:.0%} of blocks {batch}x{length} {dtype}",
        impl,
        function,
        inputs=[call],
        moved_bytes=2 * key_pages.nbytes * count / (length // BLOCK),
        rounds=7,
    )


@pytest.mark.parametrize("impl", ["winnow", "winnow, row by row", "sdpa_packed, expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("forks", "length"), [(16, 8192), (64, 8192), (16, 32768)])
def test_cascade(measure, forks, length, dtype, impl):
    """Forks of one prefix with a block of their own each; the least to read is the prefix, once."""
    query, *pages, table, lengths = make_call(1, length + forks * BLOCK, DTYPES[dtype])
    prefix, own = table[0, : length // BLOCK], table[0, length // BLOCK :]
    query = torch.randn(forks, HEADS, 1, DIM, dtype=query.dtype)
    forked = torch.cat([prefix.expand(forks, -1), own[:, None]], 1)
    call = (query, *pages, forked, torch.full((forks,), length + 40, dtype=torch.int32))

    def row_by_row(query, key_pages, value_pages, table, lengths):
        rows = zip(query[:, None], table[:, None], lengths[:, None], strict=True)
        return [paged_attention(q, key_pages, value_pages, t, n) for q, t, n in rows]

    if impl == "sdpa_packed, expanded":  # over the prefix alone, and even that without copies
        function = sdpa_packed
        inputs = (query, *(dense(x, prefix[None]).expand(forks, -1, -1, -1) for x in pages))
    else:
        function = paged_attention if impl == "winnow" else row_by_row
        inputs = call
    if impl == "winnow" and length <= 8192:
        agrees(paged_attention(*call), call)
    measure(
        f"paged_attention {forks} forks of {length} {dtype}",
        impl,
        function,
        inputs=[inputs],
        moved_bytes=2 * pages[0].nbytes,
        rounds=5,
    )


@pytest.mark.parametrize("impl", ["winnow", "sdpa_gqa", "sdpa, heads repeated"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "length"), [(1024, 1024), (512, 8192)])
def test_prefill(measure, queries, length, dtype, impl):
    """A whole prompt, and a chunk of one onto a long context."""
    call = make_call(1, length, DTYPES[dtype], queries=queries)
    query, key_pages, value_pages, table, _ = call
    key, value = dense(key_pages, table), dense(value_pages, table)
    whole = queries == length
    mask = None if whole else torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
    if impl == "winnow":
        function, inputs = paged_attention, call
    else:

        def function(query, key, value):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=whole, enable_gqa=True
            )

        repeats = 1 if impl == "sdpa_gqa" else GROUP
        inputs = (query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
    expected = sdpa_gqa(query[:, :, -1:], key, value)
    torch.testing.assert_close(function(*inputs)[:, :, -1:], expected, rtol=2e-2, atol=2e-3)
    measure(
        f"paged_attention prefill {queries} of {length} {dtype}",
        impl,
        function,
        inputs=[inputs],
        operations=4.0 * HEADS * DIM * queries * (length - queries / 2),  # two products
        bf16=dtype == "bfloat16",
        rounds=5,
    )


@pytest.mark.parametrize("impl", ["winnow", "definition"])
def test_choose_blocks(measure, impl):
    """Score and select for one step; the summaries are there."""
    call = make_call(4, 8192, torch.float32)
    query, key_pages, _, table, lengths = call
    summaries = block_summaries(key_pages, table, lengths)
    module = reference if impl == "definition" else None
    score = module.score_blocks if module else score_blocks
    select = module.select_blocks if module else select_blocks

    def choose(query, summaries):
        return select(score(query, summaries), 13, seq_lens=lengths, block_size=BLOCK)

    assert choose(query, summaries).shape == (4, KEY_HEADS, 13)
    measure(
        "score_blocks + select_blocks 4x8192",
        impl,
        choose,
        inputs=[(query, summaries)],
        moved_bytes=summaries.nbytes,
    )


class Concatenation:
    """What a plain dynamic cache does."""

    def __init__(self, key: torch.Tensor) -> None:
        self.key, self.value = key, key

    def append(self, key: torch.Tensor) -> None:
        self.key = torch.cat([self.key, key], 2)
        self.value = torch.cat([self.value, key], 2)

    def permute(self, ancestors: torch.Tensor) -> None:
        self.key, self.value = self.key[ancestors], self.value[ancestors]


@pytest.mark.parametrize("impl", ["winnow", "concatenation"])
def test_append_a_token(measure, impl):
    """One token for each of 8 rows of a tiny model, then rolled back: the overhead of a call."""
    key = torch.randn(8, 2, 1, 32)
    start = torch.randn(8, 2, 256, 32)
    if impl == "winnow":
        pool = BlockPool(64, num_layers=1, num_kv_heads=2, head_dim=32, dtype=torch.float32)
        cache = PagedKVCache(pool, 8)
        cache.append(0, start, start)

        def step():
            cache.append(0, key, key)
            if cache.seq_lens[0] > 500:
                cache.truncate_([256] * 8)
    else:
        dynamic = Concatenation(start)

        def step():
            dynamic.append(key)
            if dynamic.key.shape[2] > 500:
                dynamic.__init__(start)

    measure("append 8x1 token", impl, step)


@pytest.mark.parametrize("impl", ["winnow", "winnow int8", "winnow float8"])
@pytest.mark.parametrize("tokens", [1, 2048])
def test_append_quantised(measure, tokens, impl):
    """Storing bfloat16 tokens of 8 key heads as they are, and as codes."""
    dtype = {"winnow": torch.bfloat16, "winnow int8": torch.int8}.get(impl, torch.float8_e4m3fn)
    pool = BlockPool(128, num_layers=1, num_kv_heads=KEY_HEADS, head_dim=DIM, dtype=dtype)
    cache = PagedKVCache(pool, 1)
    key, value = torch.randn(2, 1, KEY_HEADS, tokens, DIM).bfloat16().unbind()

    def step():
        cache.append(0, key, value)
        if cache.seq_lens[0] >= 4096:
            cache.truncate_([0])

    measure(f"append quantised {tokens} tokens", impl, step)


@pytest.mark.parametrize("impl", ["winnow", "index_select"])
@pytest.mark.parametrize("blocks", [64, 1024])
def test_permute(measure, blocks, impl):
    """A resample of 64 sequences: a fork and its bookkeeping, against copying keys of one layer."""
    ancestors = torch.randint(64, (64,))
    if impl == "winnow":
        pool = BlockPool(
            64 * blocks, num_layers=1, num_kv_heads=1, head_dim=1, block_size=4, dtype=torch.float32
        )
        cache = PagedKVCache(pool, 64)
        tokens = torch.randn(64, 1, 4 * blocks, 1)
        cache.append(0, tokens, tokens)

        def function(ancestors):
            cache.fork(range(64)).permute_(ancestors)  # from all blocks distinct every time

        inputs = [(ancestors,)]
    else:
        dynamic = Concatenation(torch.randn(64, 1, 4 * blocks, 64))
        function, inputs = dynamic.permute, [(ancestors,)]
    measure(f"permute_ 64 sequences of {blocks} blocks", impl, function, inputs=inputs, rounds=5)


class TensorTables:
    """The bookkeeping of a step in tensors: owners are counted anew, shared blocks replaced."""

    def __init__(self, rows: int, blocks: int) -> None:
        self.table = torch.arange(rows * blocks).view(rows, blocks)
        self.blocks = 2 * rows * blocks

    def step(self, ancestors: torch.Tensor) -> torch.Tensor:
        table = self.table[ancestors]
        owners = torch.bincount(table.flatten(), minlength=self.blocks)
        last = table[:, -1]
        shared = (owners[last] > 1).nonzero()[:, 0]
        free = (owners == 0).nonzero()[: len(shared), 0]
        table[shared, -1] = free
        return table


@pytest.mark.parametrize("impl", ["winnow", "tensors"])
def test_bookkeeping_of_a_step(measure, impl):
    """Resample 64 sequences of 1024 blocks and append a token to each; the keys are one number."""
    rows, blocks = 64, 1024
    ancestors = torch.randint(rows, (rows,))
    if impl == "winnow":
        pool = BlockPool(
            2 * rows * blocks,
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            block_size=4,
            dtype=torch.float32,
        )
        start = PagedKVCache(pool, rows)
        tokens = torch.randn(rows, 1, 4 * blocks - 2, 1)
        start.append(0, tokens, tokens)
        token = tokens[:, :, :1]

        def function(ancestors):
            cache = start.fork(range(rows))  # every round begins alike
            cache.permute_(ancestors)
            cache.append(0, token, token)

    else:
        function = TensorTables(rows, blocks).step
    measure(f"step of {rows} sequences of {blocks} blocks", impl, function, inputs=[(ancestors,)])

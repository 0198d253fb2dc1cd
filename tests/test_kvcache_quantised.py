"""Quantised pages: what is stored, bit for bit, by operators and by pools."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import running_on
from torch_winnow import _library, reference
from torch_winnow.kvcache import BlockPool, PagedKVCache, block_summaries
from torch_winnow.reference.quantised import code_scale, paged_quantise_

CODES = (torch.int8, torch.float8_e4m3fn)
codes = pytest.mark.parametrize("code", CODES, ids=["int8", "float8"])


def empty_pages(blocks, heads, size, dim, value_dim, code):
    """Pages that were used before, by blocks that are new now."""
    pages = [torch.randint(0, 127, (blocks, heads, size, d)).char() for d in (dim, value_dim)]
    scales = [torch.zeros(blocks, heads) for _ in pages]
    return [x.view(code) for x in pages] + scales


def write(pages, *call):
    torch.ops.winnow.paged_quantise_(*pages, *call)


def same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        as_bytes = mine if mine.dtype == torch.float32 else mine.view(torch.uint8)
        other = other if other.dtype == torch.float32 else other.view(torch.uint8)
        assert torch.equal(as_bytes, other)


def dequantised(pages, scales):
    return pages.float() * scales[..., None, None]


@codes
def test_scale_of_a_magnitude(code):
    """The smallest grid point that reaches the magnitude: never more than a step away."""
    largest = torch.cat([torch.rand(5000).mul(80).sub(40).exp2(), torch.tensor([1e-45, 3e38])])
    pages = torch.zeros(5002, 1, 2, 1, dtype=code)
    scales = torch.zeros(5002, 1)
    table = torch.arange(5002, dtype=torch.int32)[:, None]
    tokens = largest[:, None, None, None]
    write(
        [pages, pages.clone(), scales, scales.clone()],
        tokens, tokens, table, torch.zeros(5002, 1, dtype=torch.int64),
    )  # fmt: skip
    assert torch.equal(scales[:, 0], code_scale(largest, code))
    most = 127 if code == torch.int8 else 448
    octave = 2 ** (0.25 if code == torch.int8 else 1) * 1.000001
    usual = largest > 1e-30
    assert (scales[usual, 0].double() * most >= largest[usual].double() * 0.9999999).all()
    assert (scales[usual, 0].double() * most <= largest[usual].double() * octave).all()


@st.composite
def writes(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.sampled_from([1, 3, 16]))
    heads, rows, width = draw(st.integers(1, 3)), draw(st.integers(0, 3)), 3
    dims = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    code = draw(st.sampled_from(CODES))
    pages = empty_pages(rows * width + 1, heads, size, *dims, code)
    table = torch.randperm(rows * width + 1)[: rows * width].int().view(rows, width)
    calls = []
    for _ in range(draw(st.integers(1, 5))):
        tokens = draw(st.integers(0, 2 * size))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        spread = draw(st.sampled_from([0.0, 1e-3, 1.0, 50.0]))
        key, value = (
            (torch.randn(rows, tokens, heads, d) * spread).to(dtype).transpose(1, 2) for d in dims
        )
        odd = draw(st.sampled_from([None, torch.nan, -torch.nan, torch.inf, -torch.inf]))
        if odd is not None and key.numel() > 0:
            key[..., torch.randint(dims[0], ())] = odd
            value[torch.rand(value.shape) < 0.2] = odd
        if draw(st.booleans()):
            start = torch.randint(width * size + 1, (rows, 1))
            positions = start + torch.arange(tokens)
        else:
            positions = torch.randint(width * size, (rows, tokens))
        positions = positions.masked_fill(positions >= width * size, -1)
        calls.append((key, value, table, positions))
    return pages, calls


@settings(max_examples=60, deadline=None)
@given(writes(), st.sampled_from(_library.available_cpu_capabilities()))
def test_writes_match_definition(case, capability):
    pages, calls = case
    expected = [x.clone() for x in pages]
    with running_on(capability):
        for call in calls:
            write(pages, *call)
            paged_quantise_(*expected, *call)
            same(pages, expected)


def make_pool(code, blocks=12, size=4, dim=8, layers=2):
    return BlockPool(
        blocks, num_layers=layers, num_kv_heads=2, head_dim=dim, block_size=size, dtype=code
    )


def tokens_of(rows, count, dim=8, spread=1.0):
    return torch.randn(2, rows, 2, count, dim).mul(spread).unbind()


def stored(cache, layer, row):
    """The keys of a row as attention sees them."""
    pages = dequantised(cache.pool.key_pages[layer], cache.pool.key_scales[layer])
    length = int(cache.seq_lens[row])
    table = cache.block_table[row, : -(-length // cache.pool.block_size)].long()
    return pages[table].transpose(0, 1).flatten(1, 2)[:, :length]


def close(ours, keys, code):
    """A code is at most half a step off; a rise of the scale rounds once more."""
    step = keys.abs().max() / 127 * 1.2
    bound = 2 * step if code == torch.int8 else keys.abs() / 15 + step / 8
    assert (ours - keys).abs().le(bound).all()


@codes
def test_pool_attributes_and_growth(code):
    pool = make_pool(code)
    assert pool.key_pages.dtype == pool.value_pages.dtype == code
    assert pool.key_scales.shape == pool.value_scales.shape == (2, 12, 2)
    assert pool.key_scales.dtype == torch.float32
    cache = PagedKVCache(pool, 2)
    key, value = tokens_of(2, 6)
    cache.append(0, key, value)
    before = stored(cache, 0, 1)
    pool.grow(20)
    assert pool.key_scales.shape == (2, 20, 2)
    assert torch.equal(stored(cache, 0, 1), before)
    cache.append(0, key, value)  # to the new memory
    close(stored(cache, 0, 1), torch.cat([key, key], 2)[1], code)
    assert BlockPool(
        1, num_layers=1, num_kv_heads=1, head_dim=1, dtype=torch.float32
    ).key_scales is None  # fmt: skip


@codes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_does_not_depend_on_the_order_of_tokens(code, dtype):
    pool = make_pool(code, size=8)
    at_once, one_by_one = PagedKVCache(pool, 1), PagedKVCache(pool, 1)
    key, value = (x.to(dtype) for x in tokens_of(1, 8))
    at_once.append(0, key, value)
    for t in range(8):
        one_by_one.append(0, key[:, :, t : t + 1], value[:, :, t : t + 1])
    blocks = int(at_once.block_table), int(one_by_one.block_table)
    assert torch.equal(*(pool.key_scales[0, block] for block in blocks))
    assert torch.equal(*(pool.value_scales[0, block] for block in blocks))
    for cache in (at_once, one_by_one):
        close(stored(cache, 0, 0), key[0].float(), code)


@codes
def test_block_starts_anew(code):
    """Freed, truncated and reused blocks forget what their last owner needed, in every layer."""
    pool = make_pool(code, blocks=2)
    cache = PagedKVCache(pool, 1)
    large, small = tokens_of(1, 8, spread=1e4), tokens_of(1, 8, spread=1e-3)
    for layer in range(2):
        cache.append(layer, *large)
    cache.truncate_([4])
    for layer in range(2):
        cache.append(layer, *(x[:, :, 4:] for x in small))
        close(stored(cache, layer, 0)[:, 4:], small[0][0, :, 4:], code)
    cache.free([0])
    cache.append(0, *small)
    close(stored(cache, 0, 0), small[0][0], code)
    # The other layer, which has not stored anything yet, may be written to.
    cache.write(1, *(x[:, :, :1] for x in small), torch.tensor([[5]]))
    cache.write(1, *(x[:, :, 1:2] for x in small), torch.tensor([[6]]))
    close(stored(cache, 1, 0)[:, 5:7], small[0][0, :, :2], code)


@codes
def test_whole_block_written_anew(code):
    """A refresh of all tokens of a block is as good as a first write."""
    pool = make_pool(code)
    cache = PagedKVCache(pool, 1)
    cache.append(0, *tokens_of(1, 8, spread=1e4))
    small = tokens_of(1, 4, spread=1e-3)
    cache.write(0, *small, torch.tensor([[7, 4, 6, 5]]))
    close(stored(cache, 0, 0)[:, 4:], small[0][0][:, [1, 3, 2, 0]], code)


@codes
def test_copies_carry_scales(code):
    pool = make_pool(code)
    parent = PagedKVCache(pool, 1)
    first = tokens_of(1, 6)
    for layer in range(2):
        parent.append(layer, *first)
    before = [stored(parent, layer, 0) for layer in range(2)]
    child = parent.fork([0, 0])
    louder = tokens_of(2, 1, spread=100.0)
    child.append(0, *louder)
    assert torch.equal(stored(parent, 0, 0), before[0])
    for row in range(2):
        close(stored(child, 0, row)[:, :4], first[0][0, :, :4], code)
        close(stored(child, 0, row)[:, 6:], louder[0][row], code)
        assert torch.equal(stored(child, 1, row)[:, :6], before[1])
    child.permute_([1, 1])
    child.append(0, *tokens_of(2, 1))
    assert torch.equal(stored(parent, 0, 0), before[0])


@codes
def test_not_a_number(code):
    """NaN and infinities stay with their own numbers."""
    pool = make_pool(code, layers=1)
    cache = PagedKVCache(pool, 1)
    key, value = tokens_of(1, 3)
    key[0, 0, 1, 2], key[0, 0, 1, 3], key[0, 0, 1, 4] = torch.nan, torch.inf, -torch.inf
    cache.append(0, key, value)
    scale, got = pool.key_scales[0, int(cache.block_table), 0], stored(cache, 0, 0)
    most = 127 if code == torch.int8 else 448
    assert got[0, 1, 3] == scale * most
    assert got[0, 1, 4] == -scale * most
    assert got[0, 1, 2].isnan() if code == torch.float8_e4m3fn else got[0, 1, 2] == 0
    others = torch.ones_like(got, dtype=torch.bool)
    others[0, 1, 2:5] = False
    close(got[others], key[0][others], code)


@codes
@pytest.mark.parametrize("kind", ["minmax", "mean"])
def test_summaries(code, kind, cpu_capability):
    """Of the numbers, not of the codes; a pool keeps them in step with scales that rise."""
    pool = BlockPool(
        6, num_layers=1, num_kv_heads=2, head_dim=20, block_size=4, dtype=code, summaries=kind
    )
    cache = PagedKVCache(pool, 2)
    for spread in (1.0, 5.0, 0.1):
        cache.append(0, *tokens_of(2, 3, dim=20, spread=spread))
        call = (pool.key_pages[0], cache.block_table, cache.seq_lens, kind)
        expected = reference.block_summaries(*call, key_scales=pool.key_scales[0])
        ours = block_summaries(*call, key_scales=pool.key_scales[0])
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        kept = pool.summaries[0][cache.block_table.long()].transpose(1, 2)
        assert torch.equal(kept, ours)
    refuses("key_scales: expected those of the quantised pages", lambda: block_summaries(*call))


@codes
def test_same_bits_whatever_threads_and_instructions(code, on_every_capability, on_thread_counts):
    def run():
        torch.manual_seed(1)
        pages = empty_pages(40, 3, 16, 37, 20, code)
        table = torch.arange(40, dtype=torch.int32).view(8, 5)
        for spread in (1.0, 3.0):
            key, value = torch.randn(8, 3, 60, 37) * spread, torch.randn(8, 3, 60, 20) * spread
            write(pages, key, value, table, torch.arange(60).expand(8, 60))
        return pages

    for runner in (on_every_capability, on_thread_counts):
        first, *others = runner(run)
        for other in others:
            same(first, other)


def arguments(code=torch.int8):
    pages = empty_pages(4, 2, 4, 8, 8, code)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    return pages, (torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), table, torch.arange(3)[None])


def checks_of(code):
    """torch itself cannot compare float8 tensors, which two of the checks would."""
    checks = ("test_autograd_registration", "test_faketensor")
    return checks + ("test_schema", "test_aot_dispatch_dynamic") * (code == torch.int8)


@codes
def test_opcheck(code):
    pages, call = arguments(code)
    torch.library.opcheck(
        torch.ops.winnow.paged_quantise_.default, (*pages, *call), test_utils=checks_of(code)
    )


def refuses(message, call):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()


def test_refusals_of_writes():
    (key_pages, value_pages, key_scales, value_scales), call = arguments()
    key, value, table, positions = call
    pages = (key_pages, value_pages, key_scales, value_scales)
    refuses(
        "key_pages: expected int8 or float8_e4m3fn, got float32",
        lambda: write((key_pages.float(), *pages[1:]), *call),
    )
    refuses(
        r"key_scales: expected \(num_blocks, Hkv\) = \(4, 2\)",
        lambda: write((*pages[:2], key_scales.T, value_scales), *call),
    )
    refuses(
        "value_scales: expected float32, got float64",
        lambda: write((*pages[:3], value_scales.double()), *call),
    )
    refuses(
        "key: expected float32, bfloat16 or float16, got float64",
        lambda: write(pages, key.double(), value, table, positions),
    )
    refuses("positions: expected -1 or 0 <= position < 8", lambda: write(
        pages, key, value, table, positions + 6
    ))  # fmt: skip
    refuses(
        "block_table: expected blocks of one owner where tokens are stored, got block 2 in rows 0",
        lambda: write(pages, *(x.expand(2, -1, -1, -1) for x in (key, value)),
                      table.expand(2, -1), positions.expand(2, -1)),
    )  # fmt: skip
    cache = PagedKVCache(make_pool(torch.int8), 1)
    double = tokens_of(1, 2)[0].double()
    refuses("key: expected torch.float32 or torch.bfloat16 or torch.float16", lambda: cache.append(
        0, double, double
    ))  # fmt: skip
    assert cache.seq_lens.item() == 0
    refuses("dtype: expected .* int8 or float8_e4m3fn, got torch.uint8", lambda: make_pool(
        torch.uint8
    ))  # fmt: skip

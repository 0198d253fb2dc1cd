"""Attention over quantised pages: the definition, and how far it is from float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TOLERANCE, running_on
from test_kvcache_attention import make
from test_kvcache_quantised import CODES, arguments, checks_of, codes, make_pool, refuses
from torch_winnow import _library, reference
from torch_winnow.kvcache import PagedKVCache, paged_attention


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=2),
    st.sampled_from(CODES),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(_library.available_cpu_capabilities()),
    st.integers(1, 6), st.integers(1, 150), st.integers(1, 150), st.sampled_from([1, 7, 64, 70]),
    st.integers(1, 9), st.booleans(), st.none() | st.integers(1, 50), st.integers(0, 2**31),
)  # fmt: skip
def test_attention_matches_definition(
    lengths, code, dtype, capability, group, dim, value_dim, size, queries, more, window, seed
):
    torch.manual_seed(seed)
    query, key, value, table, seq_lens = make(
        lengths, heads=(2 * group, 2), queries=queries, dim=dim, value_dim=value_dim,
        block_size=size, dtype=dtype,
    )  # fmt: skip
    pages = [(x.float() * 40).clamp(-127, 127).round().to(code) for x in (key, value)]
    scales = [torch.rand(len(x), 2) / 20 for x in pages]
    options = {"window": window, "sinks": 3, "causal": more}
    if more:
        options["key_bias"] = torch.randn(len(key), 2, size)
        options["key_bias"][torch.rand(len(key), 2, size) < 0.2] = -torch.inf
        named = torch.arange(table.shape[1], dtype=torch.int32).expand(len(lengths), 2, -1)
        drop = (named >= -(-seq_lens // size)[:, None, None]) | (torch.rand(named.shape) < 0.3)
        options["block_indices"] = torch.where(drop, -1, named)
    options.update(key_scales=scales[0], value_scales=scales[1], return_lse=True)
    with running_on(capability):
        out, lse = paged_attention(query, *pages, table, seq_lens, **options)
    assert out.dtype == dtype
    expected, expected_lse = reference.paged_attention(
        query.double(), *pages, table, seq_lens, **options
    )
    tolerance = {k: 4 * v for k, v in TOLERANCE[dtype].items()}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-5, atol=2e-5)


@codes
@pytest.mark.parametrize("dim", [16, 128, 300])
def test_odd_numbers_in_attention(code, dim, cpu_capability):
    """A NaN stays in its row and, of a value, in its column; what is hidden is not seen."""
    lengths, table = torch.tensor([9], dtype=torch.int32), torch.tensor([[1, 0]], dtype=torch.int32)
    query = torch.randn(1, 5, 1, dim).bfloat16()
    pages = [torch.randint(-100, 100, (2, 1, 8, dim)).div(50).to(code) for _ in range(2)]
    scales = [torch.rand(2, 1), torch.rand(2, 1)]
    query[0, 1] = 0.0
    query[0, 2] *= 1e30
    query[0, 3, 0, 0] = torch.nan
    query[0, 4] *= 1e-30
    if code == torch.float8_e4m3fn:
        pages[0][0, :, 1:] = pages[1][0, :, 1:] = torch.nan  # behind the end
        pages[1][1, 0, 3, 7] = torch.nan
    bias = torch.zeros(2, 1, 8)
    bias[1, 0, 3] = -torch.inf
    for key_bias in (None, bias):
        options = {"key_bias": key_bias, "key_scales": scales[0], "value_scales": scales[1]}
        out = paged_attention(query, *pages, table, lengths, **options)
        expected = reference.paged_attention(query, *pages, table, lengths, **options)
        torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2, equal_nan=True)
    assert out[0, 3].isnan().all()
    assert out[0, [0, 1, 2, 4]].isfinite().all()


# Relative errors (norm of the difference over norm of the result) against float32 keys and values,
# Gaussian, D=128, blocks of 64: stored at once, and token by token.
ERRORS = {torch.int8: (0.016, 0.018), torch.float8_e4m3fn: (0.045, 0.045)}


@codes
@pytest.mark.parametrize("one_by_one", [False, True])
def test_error_of_attention(code, one_by_one):
    pool = make_pool(code, blocks=8, size=64, dim=128, layers=1)
    cache = PagedKVCache(pool, 1)
    key, value = torch.randn(2, 1, 2, 300, 128).unbind()
    step = 1 if one_by_one else 300
    for t in range(0, 300, step):
        cache.append(0, key[:, :, t : t + step], value[:, :, t : t + step])
    query = torch.randn(1, 8, 1, 128)
    out = paged_attention(
        query, pool.key_pages[0], pool.value_pages[0], cache.block_table, cache.seq_lens,
        key_scales=pool.key_scales[0], value_scales=pool.value_scales[0],
    )  # fmt: skip
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert (out - expected).norm() / expected.norm() < ERRORS[code][one_by_one]


@codes
def test_attention_is_checked_and_compiles(code):
    pages, call = arguments(code)
    query, lengths = torch.randn(1, 4, 2, 8), torch.tensor([3], dtype=torch.int32)
    scales = {"key_scales": pages[2], "value_scales": pages[3]}
    torch.library.opcheck(
        torch.ops.winnow.paged_attention.default, (query, *pages[:2], call[2], lengths), scales,
        test_utils=checks_of(code),
    )  # fmt: skip
    compiled = torch.compile(paged_attention, fullgraph=True)
    expected = paged_attention(query, *pages[:2], call[2], lengths, **scales)
    assert torch.equal(compiled(query, *pages[:2], call[2], lengths, **scales), expected)


def test_refusals_of_attention():
    pages, (_, _, table, _) = arguments()
    query, lengths = torch.randn(1, 4, 1, 8), torch.tensor([3], dtype=torch.int32)

    def attend(query=query, key_pages=pages[0], value_pages=pages[1], **scales):
        return lambda: paged_attention(query, key_pages, value_pages, table, lengths, **scales)

    both = {"key_scales": pages[2], "value_scales": pages[3]}
    refuses("key_scales: expected those of the quantised pages, got None", attend())
    refuses("value_scales: expected those", attend(key_scales=pages[2]))
    refuses(
        "key_scales: expected None, because key_pages are not quantised",
        attend(key_pages=pages[0].float(), **both),
    )
    refuses("value_pages: expected int8", attend(value_pages=pages[1].float(), **both))
    refuses("query: expected .* over quantised pages, got float64", attend(query.double(), **both))
    refuses(
        r"value_scales: expected \(num_blocks, Hkv\)",
        attend(key_scales=pages[2], value_scales=pages[3][0]),
    )

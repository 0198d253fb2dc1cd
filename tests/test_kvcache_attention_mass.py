"""attention_mass against its definition, and at its edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.kvcache import attention_mass, paged_attention

INF, NAN = float("inf"), float("nan")


def make_call(dtype, *, heads=4, queries=3, block_size=16, dim=37):
    """Scattered blocks, a part block, a row shorter than its queries and an empty one."""
    query = torch.randn(4, queries, heads, dim).to(dtype).transpose(1, 2)
    pages = torch.randn(12, 2, block_size, dim).to(dtype)
    table = torch.tensor([[7, 2, 9, 4], [11, 0, -1, -1], [5, -1, -1, -1], [-1] * 4]).int()
    lengths = torch.tensor([4 * block_size - 3, block_size + 1, min(2, block_size), 0]).int()
    return query, pages, table, lengths


def close(result, call, **options):
    query, pages, table, lengths = call
    bias = options.pop("key_bias", None)
    if bias is not None:
        options["key_bias"] = bias.double()
    expected = reference.attention_mass(query.double(), pages.double(), table, lengths, **options)
    assert result.dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCE[torch.float64 if query.dtype == torch.float64 else torch.float32]
    torch.testing.assert_close(result.double(), expected, **tolerance)


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": 5, "sinks": 2}, {"scale": 0.7}]
)
def test_matches_definition(options, dtype, cpu_capability):
    call = make_call(dtype)
    close(attention_mass(*call, **options), call, **options)
    wide = (call[0].double(), call[1].double(), *call[2:])
    close(attention_mass(*wide, **options), wide, **options)


@pytest.mark.parametrize(("heads", "queries"), [(2, 1), (6, 25), (8, 70), (4, 0)])
@pytest.mark.parametrize(("block_size", "dim"), [(1, 1), (100, 8), (64, 33)])
def test_any_shape(heads, queries, block_size, dim):
    call = make_call(torch.float32, heads=heads, queries=queries, block_size=block_size, dim=dim)
    call = (*call[:3], call[3].clamp(max=2 * block_size))
    for options in ({}, {"window": 3, "causal": False}):
        close(attention_mass(*call, **options), call, **options)


def test_each_query_adds_one(dtype):
    call = make_call(dtype, heads=8, queries=9)
    mass = attention_mass(*call)
    seen = torch.tensor([9, 9, 2, 0])  # queries before the row's first position see nothing
    expected = (4 * seen)[:, None].expand(4, 2).float()
    torch.testing.assert_close(mass.sum(-1), expected, rtol=1e-5, atol=1e-5)


def test_a_given_lse_is_used(dtype):
    call = make_call(dtype)
    _, lse = paged_attention(call[0], call[1], *call[1:], window=7, return_lse=True)
    mass = attention_mass(*call, lse=lse, window=7)
    assert torch.equal(mass, attention_mass(*call, window=7))
    strided = torch.stack([lse, lse], -1)[..., 0]
    halved = attention_mass(*call, lse=strided + torch.log(torch.tensor(2.0)), window=7)
    torch.testing.assert_close(halved, mass / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_bias(dtype, bias_dtype):
    call = make_call(dtype)
    for shape in ((12, 2, 16), (2, 1), (16,)):
        bias = torch.randn(shape).to(bias_dtype)
        bias[torch.rand(shape) < 0.2] = -INF
        close(attention_mass(*call, key_bias=bias), call, key_bias=bias)


def test_what_a_query_may_not_see_never_counts():
    call = make_call(torch.float32)
    query, pages, table, lengths = call
    clean = attention_mass(*call, window=5)
    bias = torch.zeros(12, 2, 16)
    bias[7, 1, 3] = -INF
    hidden = attention_mass(*call, key_bias=bias)
    pages[7, 1, 3] = NAN
    pages[4, :, 13:] = NAN
    pages[[1, 3, 6, 8, 10]] = INF
    assert torch.equal(attention_mass(*call, window=5), clean)
    assert torch.equal(attention_mass(*call, key_bias=bias), hidden)
    spoilt = attention_mass(*call)
    assert spoilt[0, 1].isnan().any()
    assert torch.equal(spoilt[:, 0], attention_mass(*call)[:, 0])
    assert not spoilt[:, 0].isnan().any()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_call(data):
    draw, number = data.draw, st.integers
    torch.manual_seed(draw(number(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    batch, key_heads, group = draw(number(0, 3)), draw(number(1, 3)), draw(number(1, 5))
    queries, size, dim = draw(number(0, 9)), draw(number(1, 70)), draw(number(1, 40))
    width = draw(number(0, 3))
    pages = torch.randn(3 * width + 1, key_heads, size, dim).to(dtype)
    query = torch.randn(batch, key_heads * group, queries, dim).to(dtype)
    table = torch.randint(len(pages), (batch, width), dtype=torch.int32)
    lengths = torch.randint(width * size + 1, (batch,), dtype=torch.int32)
    options = {"causal": draw(st.booleans()), "window": draw(st.none() | number(1, 12))}
    options |= {"sinks": draw(number(0, 4)), "scale": draw(st.none() | st.floats(-1, 1))}
    if draw(st.booleans()):
        options["key_bias"] = torch.randn(len(pages), key_heads, size).clamp(min=-1).log()
        options["key_bias"].nan_to_num_(nan=-INF)
    close(
        attention_mass(query, pages, table, lengths, **options),
        (query, pages, table, lengths),
        **options,
    )


def test_infinite_scores_spoil_what_their_query_sees():
    query, pages, table, lengths = call = make_call(torch.float32)
    pages[7, 0, 5, 3], query[0, 1, 2, 3] = 3e38, 3e38
    mass = attention_mass(*call)
    expected = reference.attention_mass(*call)
    torch.testing.assert_close(mass, expected, equal_nan=True, **TOLERANCE[torch.float32])
    assert mass[0, 0].isnan().any()
    assert not mass[0, 1].isnan().any()


def test_large_scores():
    query, pages, table, lengths = make_call(torch.float32)
    call = (1e4 * query, 1e4 * pages, table, lengths)
    mass = attention_mass(*call)
    assert mass.isfinite().all()
    close(mass, call)


def test_strides():
    call = make_call(torch.float32)
    query, pages, table, lengths = call
    wide = torch.randn(16, 12, 2, 60).permute(1, 2, 0, 3)[..., 7:44].copy_(pages)
    loose = torch.full((8, 9), -5, dtype=torch.int32)[::2, :4].copy_(table)
    assert torch.equal(attention_mass(query, wide, loose, lengths), attention_mass(*call))


def test_nothing():
    query, pages, table, lengths = make_call(torch.float32)
    assert attention_mass(query[:0], pages, table[:0], lengths[:0]).shape == (0, 2, 64)
    assert attention_mass(query, pages, table[:, :0], lengths * 0).shape == (4, 2, 0)
    assert (attention_mass(query[:, :, :0], pages, table, lengths) == 0).all()


def test_bitwise_equal_for_any_number_of_threads(dtype, on_thread_counts):
    pages = torch.randn(90, 2, 64, 48).to(dtype)
    table = torch.randperm(90).int().view(2, 45)
    lengths = torch.tensor([2880, 2791], dtype=torch.int32)
    query = torch.randn(2, 4, 40, 48).to(dtype)
    results = on_thread_counts(lambda: attention_mass(query, pages, table, lengths))
    assert all(torch.equal(result, results[0]) for result in results)


def test_opcheck_and_compile():
    call = make_call(torch.float32)
    lse = torch.randn(4, 4, 3)
    op = torch.ops.winnow.attention_mass.default
    torch.library.opcheck(op, (*call, lse))
    torch.library.opcheck(op, (*call, lse, False, 4, 1, torch.zeros(12, 2, 16), 0.3))
    compiled = torch.compile(attention_mass, fullgraph=True)
    bias = torch.randn(2, 1)
    expected = attention_mass(*call, window=5, key_bias=bias)
    assert torch.equal(compiled(*call, window=5, key_bias=bias), expected)


def test_errors_name_the_argument():
    query, pages, table, lengths = make_call(torch.float32)
    with pytest.raises(ValueError, match=r"lse: expected \(B, Hq, T\) = \(4, 4, 3\).*got \(4, 4\)"):
        attention_mass(query, pages, table, lengths, lse=torch.zeros(4, 4))
    with pytest.raises(ValueError, match="lse: expected float32, got float64"):
        attention_mass(query, pages, table, lengths, lse=torch.zeros(4, 4, 3).double())
    with pytest.raises(ValueError, match=r"key_pages: .*D=36"):
        attention_mass(query[..., :36], pages, table, lengths)
    with pytest.raises(ValueError, match=r"block_table: .*< 12 .*got 12"):
        attention_mass(query, pages, table.clamp(min=12), lengths)
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        attention_mass(query, pages, table, lengths, window=0)
    with pytest.raises(ValueError, match="key_pages: requires a gradient"):
        attention_mass(query, pages.requires_grad_(), table, lengths)

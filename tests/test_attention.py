"""The attention operators against their definitions, and at their edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.attention import (
    block_diagonal_attention,
    cat_attention,
    chunk_attention,
)

INF = float("inf")
NAN = float("nan")


def tensors(batch, heads, rows, dim, dtype=torch.float32, slots=None, kv_heads=None, device="cpu"):
    """query, key, value, and slot_key, slot_value where a number of slots is given."""
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = [(heads, rows), (kv_heads, rows), (kv_heads, rows)]
    sizes += [] if slots is None else [(kv_heads, slots)] * 2
    return [torch.randn(batch, *size, dim).to(device, dtype) for size in sizes]


def check(function, definition, inputs, **options):
    """Result and lse against the definition in float64 on the same rounded inputs."""
    dtype = inputs[0].dtype
    out, lse = function(*inputs, **options, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected, expected_lse = definition(*(x.double() for x in inputs), **options, return_lse=True)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, **TOLERANCE[lse.dtype])
    assert torch.equal(function(*inputs, **options), out)


SHAPES = [  # batch, query heads, kv heads, rows, dim, chunk
    (1, 1, 1, 1, 1, 1),
    (2, 2, 1, 7, 5, 3),
    (1, 4, 2, 65, 16, 17),
    (1, 2, 2, 130, 64, 33),
    (1, 3, 1, 200, 31, 5),
    (1, 1, 1, 150, 128, 65),
    (1, 1, 1, 40, 256, 9),
    (1, 2, 1, 260, 8, 1000),
    (1, 1, 1, 40, 200, 1000),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cat_matches_definition(shape, dtype, device):
    batch, heads, kv_heads, rows, dim, block = shape
    inputs = tensors(batch, heads, rows, dim, dtype, kv_heads=kv_heads, device=device)
    check(cat_attention, reference.cat_attention, inputs, block_size=block)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_diagonal_matches_definition(shape, causal, dtype, device):
    batch, heads, kv_heads, rows, dim, block = shape
    inputs = tensors(batch, heads, rows, dim, dtype, kv_heads=kv_heads, device=device)
    check(
        block_diagonal_attention,
        reference.block_diagonal_attention,
        inputs,
        block_size=block,
        causal=causal,
    )


@pytest.mark.parametrize(
    ("slots", "per_chunk", "initial", "lookback"),
    [(0, 1, 0, 0), (200, 1, 1, 0), (70, 3, 0, 1), (9, 2, 4, 100)],
)
@pytest.mark.parametrize("shape", SHAPES[1:6], ids=str)
def test_chunk_matches_definition(shape, slots, per_chunk, initial, lookback, dtype, device):
    batch, heads, kv_heads, rows, dim, chunk = shape
    inputs = tensors(batch, heads, rows, dim, dtype, slots, kv_heads, device)
    check(
        chunk_attention,
        reference.chunk_attention,
        inputs,
        chunk_size=chunk,
        slots_per_chunk=per_chunk,
        initial_slots=initial,
        lookback=lookback,
    )


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "lengths",
    [[100], [3, 0, 40, 57], [1] * 100, [0, 100, 0], [64, 36]],
    ids=str,
)
@pytest.mark.parametrize(("per_chunk", "initial", "lookback"), [(1, 1, 0), (2, 0, 1), (3, 2, 5)])
def test_packed_sequences(lengths, index, per_chunk, initial, lookback, cpu_capability):
    chunk = 9
    seqlens = torch.tensor([0, *lengths]).cumsum(0).to(index)
    owned = [initial + max(-(-n // chunk) - 1, 0) * per_chunk for n in lengths]
    inputs = tensors(1, 4, 100, 20, slots=sum(owned), kv_heads=2)
    options = {
        "chunk_size": chunk,
        "slots_per_chunk": per_chunk,
        "initial_slots": initial,
        "lookback": lookback,
    }
    check(chunk_attention, reference.chunk_attention, inputs, **options, cu_seqlens=seqlens)
    # The same as each sequence by itself.
    result = chunk_attention(*inputs, **options, cu_seqlens=seqlens)
    query, key, value, slot_key, slot_value = inputs
    begin = slot = 0
    for length, own in zip(lengths, owned, strict=True):
        rows = slice(begin, begin + length)
        slots = slice(slot, slot + own)
        alone = chunk_attention(
            query[:, :, rows],
            key[:, :, rows],
            value[:, :, rows],
            slot_key[:, :, slots],
            slot_value[:, :, slots],
            **options,
        )
        torch.testing.assert_close(result[:, :, rows], alone)
        begin, slot = begin + length, slot + own


def test_float64(cpu_capability):
    inputs = tensors(2, 4, 70, 19, torch.float64, 12, 2)
    check(chunk_attention, reference.chunk_attention, inputs, chunk_size=8, lookback=1)
    check(cat_attention, reference.cat_attention, inputs[:3], block_size=9, scale=-0.3)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pattern(data):
    rows = data.draw(st.integers(0, 150))
    dim = data.draw(st.integers(1, 40))
    kv_heads = data.draw(st.integers(1, 2))
    heads = kv_heads * data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    inputs = tensors(
        data.draw(st.integers(0, 2)),
        heads,
        rows,
        dim,
        dtype,
        data.draw(st.integers(0, 90)),
        kv_heads,
    )
    check(
        chunk_attention,
        reference.chunk_attention,
        inputs,
        chunk_size=data.draw(st.integers(1, 80)),
        slots_per_chunk=data.draw(st.integers(1, 5)),
        initial_slots=data.draw(st.integers(0, 3)),
        lookback=data.draw(st.integers(0, 4)),
        scale=data.draw(st.sampled_from([None, 0.0, 0.7, -0.5])),
    )


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(("batch", "heads", "rows"), [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_empty(batch, heads, rows, kv_heads):
    inputs = tensors(batch, heads, rows, 8, slots=3, kv_heads=kv_heads if heads else 0)
    for out, lse in (
        chunk_attention(*inputs, chunk_size=4, return_lse=True),
        cat_attention(*inputs[:3], block_size=4, return_lse=True),
        block_diagonal_attention(*inputs[:3], block_size=4, return_lse=True),
    ):
        assert out.shape == (batch, heads, rows, 8)
        assert lse.shape == (batch, heads, rows)


def test_strided_inputs_are_read_in_place():
    # One checkpoint tensor (B, S, 3, H, D) with a gap between the heads.
    packed = torch.randn(2, 90, 3, 4, 40)[..., :24]
    query, key, value = (packed[:, :, i].transpose(1, 2) for i in range(3))
    expected = cat_attention(query.clone(), key.clone(), value.clone(), block_size=9)
    assert torch.equal(cat_attention(query, key, value, block_size=9), expected)
    # Vectors and tokens of the interleaved layout as two strided sources.
    blocks = torch.randn(3, 1, 2, 10, 9, 16)
    query, key, value = blocks[..., 1:, :].flatten(3, 4)
    slot_key, slot_value = blocks[1:, ..., 0, :]
    interleaved = cat_attention(*blocks.flatten(3, 4), block_size=9)
    apart = chunk_attention(query, key, value, slot_key, slot_value, chunk_size=8)
    torch.testing.assert_close(
        apart.unflatten(2, (10, 8)), interleaved.unflatten(2, (10, 9))[..., 1:, :]
    )
    # Expanded and reversed-stride-free views of a single row.
    one = torch.randn(1, 1, 1, 16).expand(2, 3, 50, 16)
    torch.testing.assert_close(cat_attention(one, one, one, block_size=7), one)


def test_no_rows_and_no_slots():
    query, key, value, slot_key, slot_value = tensors(1, 2, 0, 8, slots=0)
    empty = chunk_attention(query, key, value, slot_key, slot_value, chunk_size=4, initial_slots=0)
    assert empty.shape == (1, 2, 0, 8)


def test_rows_without_weight_are_zero(device):
    """Scores of -inf for every key: values have no weight then, those that are not finite too."""
    query, key = torch.ones(1, 1, 19, 4), torch.full((1, 1, 19, 4), -INF)
    value = torch.tensor([1.0, INF, math.nan, 2.0]).expand_as(key)
    inputs = [x.to(device) for x in (query, key, value)]
    for function in (block_diagonal_attention, reference.block_diagonal_attention):
        out, lse = function(*inputs, block_size=17, causal=True, return_lse=True)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, torch.full_like(lse, -INF))


@pytest.mark.parametrize("magnitude", [1e-20, 30.0, 1e4])
def test_extreme_scores(magnitude, cpu_capability):
    query, key, value = tensors(1, 1, 60, 16)
    query = query * magnitude
    out, lse = cat_attention(query, key, value, block_size=7, return_lse=True)
    expected, expected_lse = reference.cat_attention(
        query.double(), key.double(), value.double(), block_size=7, return_lse=True
    )
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)
    # A score of 1e5 is known to 1e-2 in float32.
    tolerance = 2e-5 + 1e-6 * magnitude
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_same_bits_for_any_number_of_threads(on_thread_counts):
    inputs = tensors(2, 4, 333, 40, slots=60, kv_heads=2)
    for function in (
        lambda: chunk_attention(*inputs, chunk_size=16, lookback=1, return_lse=True),
        lambda: cat_attention(*inputs[:3], block_size=33, return_lse=True),
        lambda: block_diagonal_attention(*inputs[:3], block_size=17, return_lse=True),
    ):
        results = on_thread_counts(function)
        assert all(torch.equal(r[0], results[0][0]) for r in results)
        assert all(torch.equal(r[1], results[0][1]) for r in results)


def test_close_on_every_instruction_set(on_every_capability):
    inputs = tensors(1, 2, 200, 48)
    results = on_every_capability(lambda: cat_attention(*inputs, block_size=33))
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": torch.zeros(2, 3, 4)},
            r"query: expected \(B, Hq, N, D\), got shape \(2, 3, 4\)",
        ),
        ({"query": torch.zeros(1, 2, 6, 0)}, r"query: expected a head dimension D from 1 to 256"),
        ({"query": torch.zeros(1, 2, 6, 257)}, r"query: expected a head dimension D from 1 to 256"),
        ({"query": torch.zeros(1, 2, 6, 8).long()}, r"query: expected float32.*got int64"),
        ({"query": torch.zeros(1, 3, 6, 8)}, r"key: expected a number of heads that divides.*3"),
        ({"query": torch.zeros(1, 2, 8, 6).mT}, r"query: the last dimension must be contiguous"),
        ({"key": torch.zeros(1, 2, 6, 8).double()}, r"key: expected float32, got float64"),
        ({"key": torch.zeros(1, 2, 6, 7)}, r"key: expected .* with B=1 and D=8 as in query"),
        ({"key": torch.zeros(1, 2, 5, 8), "value": torch.zeros(1, 2, 5, 8)}, r"key: expected N=6"),
        ({"value": torch.zeros(1, 1, 6, 8)}, r"value: expected the shape of key"),
        ({"slot_key": torch.zeros(1, 2, 3, 9)}, r"slot_key: expected .*D=8 as in query.*3, 9\)"),
        ({"slot_value": torch.zeros(1, 2, 4, 8)}, r"slot_value: expected the shape of slot_key"),
        (
            {"slot_key": torch.zeros(1, 1, 3, 8), "slot_value": torch.zeros(1, 1, 3, 8)},
            r"slot_key: expected Hkv=2 heads as in key",
        ),
        ({"chunk_size": 0}, r"chunk_size: expected at least 1, got 0"),
        ({"slots_per_chunk": 0}, r"slots_per_chunk: expected at least 1, got 0"),
        ({"initial_slots": -1}, r"initial_slots: expected at least 0, got -1"),
        ({"lookback": -1}, r"lookback: expected at least 0, got -1"),
        ({"cu_seqlens": torch.tensor([0, 6.0])}, r"cu_seqlens: expected int32 or int64"),
        ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens: expected \(S \+ 1,\)"),
        ({"cu_seqlens": torch.tensor([1, 6])}, r"cu_seqlens: expected to start at 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens: expected to end at N=6, got 5"),
        ({"cu_seqlens": torch.tensor([0, 7])}, r"cu_seqlens: expected ascending values up to N=6"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, r"cu_seqlens: .*got 2 after 4 at index 2"),
        ({"cu_seqlens": torch.tensor([0, 1, 2, 3, 6])}, r"slot_key: expected at least 4 slots"),
        (
            {"initial_slots": 2**62, "cu_seqlens": torch.tensor([0, 6])},
            r"slot_key: expected initial_slots .* slots for the sequence",
        ),
    ],
)
def test_errors_name_the_argument(change, message):
    query, key, value, slot_key, slot_value = tensors(1, 2, 6, 8, slots=3)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "slot_key": slot_key,
        "slot_value": slot_value,
        "chunk_size": 4,
    } | change
    with pytest.raises(ValueError, match=message):
        chunk_attention(**arguments)


def test_errors_of_the_others():
    query, key, value = tensors(1, 2, 6, 8)
    with pytest.raises(ValueError, match="block_size: expected at least 1, got 0"):
        cat_attention(query, key, value, block_size=0)
    with pytest.raises(ValueError, match="block_size: expected at least 1, got -3"):
        block_diagonal_attention(query, key, value, block_size=-3)
    two = torch.zeros(2, 2, 6, 8)
    with pytest.raises(ValueError, match="query: expected B = 1 with cu_seqlens"):
        chunk_attention(two, two, two, two, two, chunk_size=2, cu_seqlens=torch.tensor([0, 6]))


def test_huge_options_are_as_good_as_large_ones():
    inputs = tensors(1, 1, 50, 8, slots=9)
    result = chunk_attention(*inputs, chunk_size=2**62, initial_slots=2**62, lookback=2**62)
    expected = chunk_attention(*inputs, chunk_size=50, initial_slots=9)
    assert torch.equal(result, expected)
    result = chunk_attention(*inputs, chunk_size=5, slots_per_chunk=2**62, lookback=2**62)
    expected = chunk_attention(*inputs, chunk_size=5, slots_per_chunk=9, lookback=10)
    assert torch.equal(result, expected)

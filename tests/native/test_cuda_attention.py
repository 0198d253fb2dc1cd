"""Attention on the GPU at its edges; against its definitions: tests/test_attention.py."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.attention import block_diagonal_attention, cat_attention, chunk_attention

INF = float("inf")
NAN = float("nan")


def tensors(gpu, batch, heads, kv_heads, rows, dim, dtype=torch.float32, slots=None):
    """query, key, value, and slot_key, slot_value where a number of slots is given."""
    sizes = [(heads, rows), (kv_heads, rows), (kv_heads, rows)]
    sizes += [] if slots is None else [(kv_heads, slots)] * 2
    return [torch.randn(batch, *size, dim, device=gpu).to(dtype) for size in sizes]


def check(function, inputs, **options):
    """Result and lse against the definition in float64 on the same rounded inputs."""
    dtype = inputs[0].dtype
    definition = getattr(reference, function.__name__)
    out, lse = function(*inputs, **options, return_lse=True)
    expected, expected_lse = definition(*(x.double() for x in inputs), **options, return_lse=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, **TOLERANCE[lse.dtype])
    return out, lse


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[3, 0, 40, 27], [1] * 70, [0, 70, 0]], ids=str)
@pytest.mark.parametrize(("per_chunk", "initial", "lookback"), [(1, 1, 0), (2, 0, 1)])
def test_packed_sequences(gpu, lengths, index, per_chunk, initial, lookback):
    seqlens = torch.tensor([0, *lengths], device=gpu).cumsum(0).to(index)
    owned = sum(initial + max(-(-n // 9) - 1, 0) * per_chunk for n in lengths)
    check(
        chunk_attention,
        tensors(gpu, 1, 2, 2, 70, 20, slots=owned + 3),
        chunk_size=9,
        slots_per_chunk=per_chunk,
        initial_slots=initial,
        lookback=lookback,
        cu_seqlens=seqlens,
    )


@pytest.mark.parametrize("wrong", [[0, 9, 5, 30], [4, 50, 99, 1 << 40], [-3, -2, -1, 30], [0] * 4])
def test_wrong_sequences_are_brought_into_range(gpu, wrong):
    inputs = tensors(gpu, 1, 1, 1, 30, 8, slots=5)  # the emulator objects to what lies outside
    chunk_attention(*inputs, chunk_size=4, cu_seqlens=torch.tensor(wrong, device=gpu))


def test_float64(gpu):
    inputs = tensors(gpu, 1, 2, 1, 20, 19, torch.float64, 4)
    check(chunk_attention, inputs, chunk_size=8, lookback=1)
    check(cat_attention, inputs[:3], block_size=9, scale=-0.3)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(("batch", "heads", "rows"), [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_empty(gpu, batch, heads, rows, kv_heads):
    inputs = tensors(gpu, batch, heads, kv_heads if heads else 0, rows, 8, slots=3)
    for out, lse in (
        chunk_attention(*inputs, chunk_size=4, return_lse=True),
        cat_attention(*inputs[:3], block_size=4, return_lse=True),
    ):
        assert out.shape == (batch, heads, rows, 8)
        assert lse.shape == (batch, heads, rows)


@pytest.mark.parametrize(("gap", "dtype"), [(8, torch.bfloat16), (3, torch.bfloat16)])
def test_strided_inputs_are_read_in_place(gpu, gap, dtype):
    packed = torch.randn(1, 40, 3, 2, 24 + gap, device=gpu).to(dtype)[..., :24]
    query, key, value = (packed[:, :, i].transpose(1, 2) for i in range(3))
    expected = cat_attention(query.clone(), key.clone(), value.clone(), block_size=9)
    assert torch.equal(cat_attention(query, key, value, block_size=9), expected)
    one = torch.randn(1, 1, 1, 16, device=gpu).to(dtype).expand(1, 2, 20, 16)
    torch.testing.assert_close(cat_attention(one, one, one, block_size=7), one)


def test_rows_that_attend_nothing(gpu):
    query = torch.ones(1, 1, 3, 4, device=gpu)
    key = torch.full((1, 1, 3, 4), -INF, device=gpu)
    out, lse = block_diagonal_attention(query, key, key.clone(), block_size=2, return_lse=True)
    assert lse.eq(-INF).all()
    value = torch.randn(1, 1, 3, 4, device=gpu)
    out = block_diagonal_attention(query, key, value, block_size=2)
    assert out.eq(0).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_excluded_values_never_reach_a_result(gpu, bad, dtype):
    """Row 40 changes; what may not see it keeps its bits, what does see its value gets it."""
    query, key, value, slot_key, slot_value = tensors(gpu, 1, 1, 1, 70, 16, dtype, 10)

    def run():
        return (
            cat_attention(query, key, value, block_size=9),
            block_diagonal_attention(query, key, value, block_size=9),
            chunk_attention(query, key, value, slot_key, slot_value, chunk_size=8),
        )

    before = run()
    for tensor in (key, value):
        tensor[:, :, 41] = bad
    for tensor in (slot_key, slot_value):
        tensor[:, :, 5] = bad
    seen = torch.arange(70, device=gpu)
    chunk = seen // 8
    sees = (
        (seen >= 41) & (seen < 45),
        (seen >= 36) & (seen < 45),
        ((seen >= 41) & (seen < 48)) | (chunk >= 5),
    )
    for old, new, rows in zip(before, run(), sees, strict=True):
        assert torch.equal(old[:, :, ~rows], new[:, :, ~rows])
        assert new[:, :, rows].isfinite().logical_not().any(-1).all()


@pytest.mark.parametrize(("initial", "per_chunk"), [(1, 1), (0, 2)])
def test_no_row_sees_a_later_one(gpu, initial, per_chunk):
    """Each slot and token is changed in turn; only what the pattern names may change."""
    inputs = tensors(gpu, 1, 1, 1, 20, 8, torch.bfloat16, 8)
    options = {"chunk_size": 5, "initial_slots": initial, "slots_per_chunk": per_chunk}
    before = chunk_attention(*inputs, **options)
    rows = torch.arange(20, device=gpu)
    for place in range(20):
        changed = [x.clone() for x in inputs]
        for i in (1, 2):
            changed[i][:, :, place] += 1
        moved = (chunk_attention(*changed, **options) != before).any(-1).flatten()
        assert torch.equal(moved, (rows >= place) & (rows // 5 == place // 5))
    for slot in range(8):
        changed = [x.clone() for x in inputs]
        for i in (3, 4):
            changed[i][:, :, slot] += 1
        moved = (chunk_attention(*changed, **options) != before).any(-1).flatten()
        assert torch.equal(moved, slot < initial + rows // 5 * per_chunk)


@pytest.mark.parametrize("magnitude", [1e-20, 1e4])
def test_extreme_scores(gpu, magnitude):
    query, key, value = tensors(gpu, 1, 1, 1, 40, 16)
    query = query * magnitude
    out, lse = cat_attention(query, key, value, block_size=7, return_lse=True)
    expected, expected_lse = reference.cat_attention(
        query.double(), key.double(), value.double(), block_size=7, return_lse=True
    )
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6 + 1e-7 * magnitude)
    tolerance = 2e-5 + 1e-6 * magnitude  # a score of 1e5 is known to 1e-2 in float32
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_same_bits_in_every_order(on_every_order, gpu):
    inputs = tensors(gpu, 1, 2, 1, 70, 16, torch.float16, 10)
    results = on_every_order(lambda: chunk_attention(*inputs, chunk_size=9, return_lse=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_errors_name_the_argument(gpu):
    query, key, value, slot_key, slot_value = tensors(gpu, 1, 3, 1, 6, 8, slots=3)
    with pytest.raises(ValueError, match=r"chunk_size: expected at least 1, got 0"):
        chunk_attention(query, key, value, slot_key, slot_value, chunk_size=0)
    with pytest.raises(ValueError, match=r"key: expected a number of heads that divides"):
        cat_attention(query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1), block_size=2)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected int32 or int64"):
        chunk_attention(
            query, key, value, slot_key, slot_value, chunk_size=2, cu_seqlens=query[0, 0, 0]
        )

"""Gradients of attention on the GPU; cat_attention's: tests/test_attention_gradients.py."""

from __future__ import annotations

import host_library
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torch_winnow import reference
from torch_winnow.attention import block_diagonal_attention, cat_attention, chunk_attention

NAN = float("nan")

# Gradients pass through two roundings of weights more than outputs do.
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2},
    torch.float16: {"rtol": 1e-2, "atol": 5e-3},
}


def leaves(gpu, batch, heads, kv_heads, rows, dim, dtype=torch.float32, slots=None):
    sizes = [(heads, rows), (kv_heads, rows), (kv_heads, rows)]
    sizes += [] if slots is None else [(kv_heads, slots)] * 2
    made = [torch.randn(batch, *size, dim, device=gpu).to(dtype) for size in sizes]
    return [x.requires_grad_() for x in made]


def gradients(function, inputs, weights=None, **options):
    out, lse = function(*inputs, **options, return_lse=True)
    weights = weights or (torch.randn_like(out), torch.randn_like(lse))
    return torch.autograd.grad((out, lse), inputs, weights), weights


def check(function, inputs, **options):
    """Through out and lse, against those of the definition in float64."""
    grads, (weight, lse_weight) = gradients(function, inputs, **options)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    definition = getattr(reference, function.__name__)
    out, lse = definition(*wide, **options, return_lse=True)
    seen = lse > -torch.inf
    loss = (out * weight).sum() + lse[seen] @ lse_weight[seen].double()
    for grad, value, x in zip(grads, torch.autograd.grad(loss, wide), inputs, strict=True):
        assert grad.dtype == x.dtype
        torch.testing.assert_close(grad.double(), value, **TOLERANCE[x.dtype])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 1, 67, 16, 17), (1, 1, 1, 130, 40, 5)], ids=str)
def test_block_diagonal(gpu, shape, causal, dtype):
    inputs = leaves(gpu, *shape[:5], dtype)
    check(block_diagonal_attention, inputs, block_size=shape[-1], causal=causal)


@pytest.mark.parametrize(
    ("slots", "per_chunk", "initial", "lookback"),
    [(0, 1, 0, 0), (70, 3, 0, 1), (5, 2, 2, 2), (90, 1, 4, 100)],
)
def test_chunk(gpu, slots, per_chunk, initial, lookback, dtype):
    check(
        chunk_attention,
        leaves(gpu, 1, 2, 1, 80, 16, dtype, slots),
        chunk_size=7,
        slots_per_chunk=per_chunk,
        initial_slots=initial,
        lookback=lookback,
    )


@pytest.mark.parametrize(("per_chunk", "initial", "lookback"), [(1, 1, 0), (2, 0, 1)])
@pytest.mark.parametrize("lengths", [[3, 0, 40, 27], [0, 70, 0]], ids=str)
def test_packed_sequences(gpu, lengths, per_chunk, initial, lookback):
    owned = sum(initial + max(-(-n // 9) - 1, 0) * per_chunk for n in lengths)
    check(
        chunk_attention,
        leaves(gpu, 1, 2, 1, 70, 8, slots=owned + 2),
        chunk_size=9,
        slots_per_chunk=per_chunk,
        initial_slots=initial,
        lookback=lookback,
        cu_seqlens=torch.tensor([0, *lengths], device=gpu).cumsum(0),
    )


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_pattern(gpu, data):
    kv_heads = data.draw(st.integers(1, 2))
    inputs = leaves(
        gpu,
        data.draw(st.integers(1, 2)),
        kv_heads * data.draw(st.integers(1, 2)),
        kv_heads,
        data.draw(st.integers(1, 100)),
        data.draw(st.integers(1, 40)),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        data.draw(st.integers(0, 90)),
    )
    check(
        chunk_attention,
        inputs,
        chunk_size=data.draw(st.integers(1, 80)),
        slots_per_chunk=data.draw(st.integers(1, 5)),
        initial_slots=data.draw(st.integers(0, 3)),
        lookback=data.draw(st.integers(0, 4)),
        scale=data.draw(st.sampled_from([None, 0.0, 0.3, -0.5])),
    )


def test_several_splits(gpu):
    """Enough rows that the sums of slots are made in parts."""
    check(cat_attention, leaves(gpu, 1, 1, 1, 1100, 8), block_size=65)
    check(chunk_attention, leaves(gpu, 1, 2, 1, 800, 4, slots=3), chunk_size=300)


def test_float64(gpu):
    check(cat_attention, leaves(gpu, 1, 2, 1, 20, 19, torch.float64), block_size=6, scale=-0.3)


def test_strided(gpu):
    packed = torch.randn(1, 30, 3, 2, 24, device=gpu, dtype=torch.bfloat16)
    views = [packed[:, :, i, :, :16].transpose(1, 2).requires_grad_() for i in range(3)]
    copies = [x.detach().clone().requires_grad_() for x in views]
    weight = torch.randn(1, 30, 2, 16, device=gpu).bfloat16().transpose(1, 2)
    weights = (weight, torch.zeros(1, 2, 30, device=gpu))
    strided, _ = gradients(cat_attention, views, weights, block_size=9)
    expected, _ = gradients(cat_attention, copies, weights, block_size=9)
    assert all(torch.equal(a, b) for a, b in zip(strided, expected, strict=True))


@pytest.mark.parametrize(("batch", "heads", "rows"), [(0, 2, 5), (2, 0, 5), (2, 2, 0)])
def test_empty(gpu, batch, heads, rows):
    inputs = leaves(gpu, batch, heads, heads, rows, 8, slots=3)
    for grad in gradients(chunk_attention, inputs, chunk_size=4)[0]:
        assert grad.eq(0).all()


@pytest.mark.parametrize("changed", range(6), ids=lambda i: ("q", "k", "v", "sk", "sv", "g")[i])
def test_excluded_values_never_reach_a_gradient(gpu, changed, dtype):
    """A NaN in one row or slot leaves every gradient's bits where the pattern does not connect."""
    inputs = leaves(gpu, 1, 1, 1, 70, 16, dtype, slots=10)
    options = {"chunk_size": 8}
    before, (weight, lse_weight) = gradients(chunk_attention, inputs, **options)
    slot = 5  # seen by the chunks from 5 on
    row = 43  # in chunk 5, which sees slots 0 to 5
    with torch.no_grad():
        target = weight if changed == 5 else inputs[changed]
        target[:, :, slot if changed in (3, 4) else row] = NAN
    after, _ = gradients(chunk_attention, inputs, (weight, lse_weight), **options)
    rows = torch.arange(70, device=gpu)
    # Query rows whose weights or gradients see the NaN, and the keys that these rows see.
    if changed in (0, 5):
        touched = rows == row
    elif changed in (1, 2):
        touched = (rows >= row) & (rows // 8 == row // 8)
    else:
        touched = rows // 8 >= slot
    local = torch.stack([((rows >= r) & (rows // 8 == r // 8) & touched).any() for r in range(70)])
    slotted = torch.stack([((rows // 8 + 1 > s) & touched).any() for s in range(10)])
    connected = (touched, local, local, slotted, slotted)
    for old, new, where in zip(before, after, connected, strict=True):
        assert torch.equal(old[:, :, ~where], new[:, :, ~where])
    assert all(new.isnan().any() for new in after[:2])


def test_rows_that_attend_nothing_have_no_gradient(gpu):
    inputs = leaves(gpu, 1, 1, 1, 3, 4)
    with torch.no_grad():
        inputs[1].fill_(-torch.inf)
        inputs[0].fill_(1.0)
    grads, _ = gradients(block_diagonal_attention, inputs, block_size=2)
    assert grads[2].eq(0).all()


@pytest.mark.parametrize(("slots", "expected"), [(0, 1 + 3), (5, 1 + 5)])
def test_launches(gpu, slots, expected):
    if gpu.type != "cpu":
        pytest.skip("launches are counted where the host executes them")
    inputs = leaves(gpu, 1, 2, 1, 20, 8, slots=slots)
    before = host_library.launches()
    gradients(chunk_attention, inputs, chunk_size=4)
    assert host_library.launches() - before == expected


def test_same_bits_in_every_order(on_every_order, gpu):
    inputs = leaves(gpu, 1, 4, 2, 70, 16, torch.float16, 10)
    _, weights = gradients(chunk_attention, inputs, chunk_size=9)

    def run():
        whole, _ = gradients(chunk_attention, inputs, weights, chunk_size=9)
        return (*whole, *gradients(cat_attention, inputs[:3], weights, block_size=9)[0])

    results = on_every_order(run)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))

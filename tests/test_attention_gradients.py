"""Gradients of the attention operators: against autograd through the definition, and gradcheck."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_winnow import reference
from torch_winnow.attention import block_diagonal_attention, cat_attention, chunk_attention

# Gradients pass through two roundings of weights more than outputs do.
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 2e-5},
    torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2},
    torch.float16: {"rtol": 1e-2, "atol": 5e-3},
}


def leaves(*shapes, dtype=torch.float32, device="cpu"):
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def check_gradients(function, definition, inputs, **options):
    """Gradients through out and lse against those of the definition in float64."""
    dtype = inputs[0].dtype
    out, lse = function(*inputs, **options, return_lse=True)
    weight, lse_weight = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), inputs, (weight, lse_weight))

    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected_out, expected_lse = definition(*wide, **options, return_lse=True)
    seen = expected_lse > -torch.inf
    loss = (expected_out * weight).sum() + expected_lse[seen] @ lse_weight[seen].double()
    expected = torch.autograd.grad(loss, wide)
    for grad, value, x in zip(grads, expected, inputs, strict=True):
        assert grad.dtype == dtype
        assert grad.shape == x.shape
        torch.testing.assert_close(grad.double(), value, **TOLERANCE[dtype])


SHAPES = [  # batch, query heads, kv heads, rows, dim, chunk
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 65, 17, 17),
    (1, 3, 1, 300, 16, 5),
    (1, 2, 2, 150, 64, 33),
    (1, 1, 1, 70, 80, 9),
    (1, 1, 1, 40, 128, 33),
    (1, 1, 1, 40, 256, 9),
    (1, 1, 1, 1100, 8, 65),  # several splits
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cat(shape, dtype, device):
    batch, heads, kv_heads, rows, dim, block = shape
    sizes = [(batch, heads, rows, dim), *[(batch, kv_heads, rows, dim)] * 2]
    inputs = leaves(*sizes, dtype=dtype, device=device)
    check_gradients(cat_attention, reference.cat_attention, inputs, block_size=block)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_block_diagonal(shape, causal, dtype):
    batch, heads, kv_heads, rows, dim, block = shape
    inputs = leaves((batch, heads, rows, dim), *[(batch, kv_heads, rows, dim)] * 2, dtype=dtype)
    check_gradients(
        block_diagonal_attention,
        reference.block_diagonal_attention,
        inputs,
        block_size=block,
        causal=causal,
    )


@pytest.mark.parametrize(
    ("slots", "per_chunk", "initial", "lookback"),
    [(0, 1, 0, 0), (70, 3, 0, 1), (5, 2, 2, 2), (90, 1, 4, 100)],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunk(shape, slots, per_chunk, initial, lookback, dtype):
    batch, heads, kv_heads, rows, dim, chunk = shape
    inputs = leaves(
        (batch, heads, rows, dim),
        *[(batch, kv_heads, rows, dim)] * 2,
        *[(batch, kv_heads, slots, dim)] * 2,
        dtype=dtype,
    )
    check_gradients(
        chunk_attention,
        reference.chunk_attention,
        inputs,
        chunk_size=chunk,
        slots_per_chunk=per_chunk,
        initial_slots=initial,
        lookback=lookback,
    )


@pytest.mark.parametrize(("per_chunk", "initial", "lookback"), [(1, 1, 0), (2, 0, 1), (1, 2, 9)])
@pytest.mark.parametrize("lengths", [[100], [3, 0, 40, 57], [0, 700, 0, 5, 395]], ids=str)
def test_packed_sequences(lengths, per_chunk, initial, lookback):
    chunk, rows = 9, sum(lengths)
    slots = sum(initial + max(-(-n // chunk) - 1, 0) * per_chunk for n in lengths)
    inputs = leaves((1, 4, rows, 8), *[(1, 2, rows, 8)] * 2, *[(1, 2, slots, 8)] * 2)
    check_gradients(
        chunk_attention,
        reference.chunk_attention,
        inputs,
        chunk_size=chunk,
        slots_per_chunk=per_chunk,
        initial_slots=initial,
        lookback=lookback,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
    )


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_pattern(data):
    rows = data.draw(st.integers(0, 700))
    dim = data.draw(st.integers(1, 20))
    kv_heads = data.draw(st.integers(1, 2))
    heads = kv_heads * data.draw(st.integers(1, 2))
    slots = data.draw(st.integers(0, 90))
    check_gradients(
        chunk_attention,
        reference.chunk_attention,
        leaves(
            (1, heads, rows, dim), *[(1, kv_heads, rows, dim)] * 2, *[(1, kv_heads, slots, dim)] * 2
        ),
        chunk_size=data.draw(st.integers(1, 300)),
        slots_per_chunk=data.draw(st.integers(1, 5)),
        initial_slots=data.draw(st.integers(0, 3)),
        lookback=data.draw(st.integers(0, 3)),
        scale=data.draw(st.sampled_from([None, 0.0, -0.5])),
    )


def test_gradcheck():
    query, key, value, slot_key, slot_value = leaves(
        (1, 2, 11, 3), *[(1, 1, 11, 3)] * 2, *[(1, 1, 3, 3)] * 2, dtype=torch.float64
    )

    def chunk(*inputs):
        return chunk_attention(*inputs, chunk_size=4, lookback=1, return_lse=True)

    def cat(*inputs):
        return cat_attention(*inputs, block_size=4, return_lse=True)

    def block(*inputs):
        return block_diagonal_attention(*inputs, block_size=4, return_lse=True)

    assert torch.autograd.gradcheck(chunk, (query, key, value, slot_key, slot_value))
    assert torch.autograd.gradcheck(cat, (query, key, value))
    assert torch.autograd.gradcheck(block, (query, key, value))


def test_same_bits_for_any_number_of_threads(on_thread_counts):
    inputs = leaves((1, 4, 1500, 16), *[(1, 2, 1500, 16)] * 2, *[(1, 2, 90, 16)] * 2)

    def gradients():
        out = chunk_attention(*inputs, chunk_size=16, lookback=1)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    results = on_thread_counts(gradients)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_interleaved_equals_two_streams():
    """The same attention in both layouts, with the same gradient of vectors and tokens."""
    blocks = torch.randn(3, 1, 2, 12, 9, 16, requires_grad=True)
    tokens = blocks[..., 1:, :].flatten(3, 4)
    apart = chunk_attention(*tokens, *blocks[1:, ..., 0, :], chunk_size=8).unflatten(2, (12, 8))
    interleaved = cat_attention(*blocks.flatten(3, 4), block_size=9).unflatten(2, (12, 9))
    weight = torch.randn_like(apart)
    (one,) = torch.autograd.grad((apart * weight).sum(), blocks)
    (other,) = torch.autograd.grad((interleaved[..., 1:, :] * weight).sum(), blocks)
    torch.testing.assert_close(one, other)


def test_expanded_and_strided_upstream():
    inputs = leaves(*[(1, 2, 50, 8)] * 3)
    grads = torch.autograd.grad(cat_attention(*inputs, block_size=9).sum(), inputs)
    again = torch.autograd.grad(
        cat_attention(*inputs, block_size=9), inputs, torch.ones(1, 2, 8, 50).mT
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_only_lse():
    inputs = leaves(*[(1, 1, 20, 8)] * 3, dtype=torch.float64)
    grads = torch.autograd.grad(
        cat_attention(*inputs, block_size=5, return_lse=True)[1].sum(), inputs
    )
    expected = torch.autograd.grad(
        reference.cat_attention(*inputs, block_size=5, return_lse=True)[1].sum(),
        inputs,
        allow_unused=True,
        materialize_grads=True,
    )
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["cat", "chunk", "block_diagonal"])
def test_second_derivative_is_refused(name):
    inputs = leaves(*[(1, 1, 6, 4)] * 5)
    run = {
        "cat": lambda: cat_attention(*inputs[:3], block_size=3),
        "chunk": lambda: chunk_attention(*inputs, chunk_size=3),
        "block_diagonal": lambda: block_diagonal_attention(*inputs[:3], block_size=3),
    }[name]
    (grad,) = torch.autograd.grad(run().square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}_attention is differentiable once"):
        grad.sum().backward()

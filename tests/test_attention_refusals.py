"""What the attention functions refuse before an operator is called, and what they save."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from torch_winnow import reference
from torch_winnow.attention import (
    block_diagonal_attention,
    cat_attention,
    chunk_attention,
    merge_attention,
)

X = torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0))

# Each function of one tensor x, which enters as `argument`.
OF_ONE = {
    "cat_attention": ("key", lambda x: cat_attention(X, x, X, block_size=4)),
    "block_diagonal_attention": (
        "value",
        lambda x: block_diagonal_attention(X, X, x, block_size=4),
    ),
    "chunk_attention": ("slot_key", lambda x: chunk_attention(X, X, X, x, X, chunk_size=4)),
    "merge_attention": (
        r"lses\[1\]",
        lambda x: merge_attention([X, X], [X[..., 0], x if x is None else x[..., 0]])[0],
    ),
}
NOT_FORWARD = "forward-mode differentiation .* not implemented. Use reverse"


@pytest.mark.parametrize("name", OF_ONE)
def test_forward_mode_is_refused(name):
    _, function = OF_ONE[name]
    with pytest.raises(NotImplementedError, match=f"{name}: {NOT_FORWARD}"):
        torch.func.jvp(function, (X,), (torch.ones_like(X),))
    with pytest.raises(NotImplementedError, match=f"{name}: {NOT_FORWARD}"):
        torch.func.jacfwd(function)(X)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=NOT_FORWARD):
        function(forward_ad.make_dual(X, torch.ones_like(X)))


@pytest.mark.parametrize("name", OF_ONE)
def test_forward_over_reverse_is_refused(name):
    _, function = OF_ONE[name]
    x = X.clone().requires_grad_()
    out = function(x)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match=NOT_FORWARD):
            torch.autograd.grad(out, x, grad)


@pytest.mark.parametrize("name", OF_ONE)
def test_nested_forward_mode_is_refused(name):
    _, function = OF_ONE[name]
    ones = torch.ones_like(X)
    with pytest.raises(NotImplementedError, match=NOT_FORWARD):
        torch.func.jvp(
            lambda x: torch.func.jvp(lambda y: function(x) + y.sum(), (X,), (ones,))[0],
            (X,),
            (ones,),
        )


def test_constants_within_forward_mode_are_served():
    expected = cat_attention(X, X, X, block_size=4)
    result, tangent = torch.func.jvp(
        lambda x: x + cat_attention(X, X, X, block_size=4), (X,), (torch.ones_like(X),)
    )
    assert torch.equal(result, X + expected)
    assert torch.equal(tangent, torch.ones_like(X))


def test_the_definition_serves_forward_mode():
    x = X.double()
    direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    _, tangent = torch.func.jvp(
        lambda x: reference.attention.cat_attention(x, x, x, block_size=3), (x,), (direction,)
    )
    step = 1e-6 * direction
    after, before = (cat_attention(y, y, y, block_size=3) for y in (x + step, x - step))
    torch.testing.assert_close(tangent, (after - before) / 2e-6, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OF_ONE)
def test_not_a_tensor(name):
    argument, function = OF_ONE[name]
    with pytest.raises(ValueError, match=f"^{argument}: expected a tensor, got None$"):
        function(None)


def test_cu_seqlens_not_a_tensor():
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected a tensor, got \[0, 8\]$"):
        chunk_attention(X, X, X, X, X, chunk_size=4, cu_seqlens=[0, 8])


def test_parts_that_are_no_sequence():
    with pytest.raises(ValueError, match="^outs: expected a list or tuple .* got generator$"):
        merge_attention((x for x in [X, X]), [X[..., 0], X[..., 0]])
    with pytest.raises(ValueError, match="^lses: expected a list or tuple .* got NoneType$"):
        merge_attention([X, X], None)
    with pytest.raises(ValueError, match="^lses: .* got a tensor without dimensions$"):
        merge_attention([X, X], torch.tensor(1.0))


def test_cu_seqlens_changed_before_the_backward():
    x = X.clone().requires_grad_()
    cu_seqlens = torch.tensor([0, 4, 8])
    slots = torch.cat([X, X], dim=2)
    out = chunk_attention(x, X, X, slots, slots, chunk_size=2, cu_seqlens=cu_seqlens)
    cu_seqlens[1] = 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_slots_that_a_huge_option_asks_for():
    cu_seqlens = torch.tensor([0, 8])
    with pytest.raises(ValueError, match=r"slot_key: expected .* = 1 \+ 3 \* 4611686018427387904 "):
        chunk_attention(
            *(X, X, X, X, X), chunk_size=2, slots_per_chunk=2**62, cu_seqlens=cu_seqlens
        )


@pytest.mark.parametrize(
    "dtype", [torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16]
)
def test_dtypes_are_named(dtype):
    x = X.abs().to(dtype)
    with pytest.raises(ValueError, match=f"query: .* got {str(dtype).removeprefix('torch.')}$"):
        cat_attention(x, x, x, block_size=4)


def test_contiguity_names_the_shape():
    x = X.transpose(2, 3)
    with pytest.raises(ValueError, match=r"key: .* stride \d+ with shape \(1, 2, 4, 8\)$"):
        cat_attention(x.contiguous(), x, x, block_size=4)

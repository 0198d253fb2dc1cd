"""The attention operators under opcheck and torch.compile, forward and training."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from torch_winnow.attention import (
    block_diagonal_attention,
    cat_attention,
    chunk_attention,
    merge_attention,
)


def leaves(count, requires_grad=True):
    return [torch.randn(1, 2, 20, 8, requires_grad=requires_grad) for _ in range(count)]


CALLS = {
    "cat_attention": lambda x: cat_attention(*x[:3], block_size=5, return_lse=True),
    "chunk_attention": lambda x: chunk_attention(*x, chunk_size=4, lookback=1, return_lse=True),
    "packed chunk_attention": lambda x: chunk_attention(
        *x, chunk_size=4, cu_seqlens=torch.tensor([0, 7, 20]), return_lse=True
    ),
    "block_diagonal_attention": lambda x: block_diagonal_attention(
        *x[:3], block_size=5, return_lse=True
    ),
    "merge_attention": lambda x: merge_attention(x[:2], [y.sum(-1) for y in x[2:4]]),
}

OPERANDS = {
    "cat_attention": (3, (5, None)),
    "chunk_attention": (5, (4, 1, 1, 1, 0.3, torch.tensor([0, 7, 20]))),
    "block_diagonal_attention": (3, (5, True, None)),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_opcheck(name):
    count, options = OPERANDS[name]
    inputs = leaves(count)
    operator = getattr(torch.ops.winnow, name)
    torch.library.opcheck(operator.default, (*inputs, *options))
    inputs = [x.detach() for x in inputs]
    out, lse = operator(*inputs, *options)
    backward = getattr(torch.ops.winnow, f"{name}_backward")
    torch.library.opcheck(
        backward.default,
        (torch.randn_like(out), torch.randn_like(lse), *inputs, out, lse, *options),
    )


def test_opcheck_merge():
    outs, lses = leaves(2), [torch.randn(1, 2, 20, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(torch.ops.winnow.merge_attention.default, (outs, lses))
    outs, lses = [x.detach() for x in outs], [x.detach() for x in lses]
    out, lse = merge_attention(outs, lses)
    torch.library.opcheck(
        torch.ops.winnow.merge_attention_backward.default,
        (torch.randn_like(out), torch.randn_like(lse), outs, lses, out, lse),
    )


@pytest.mark.parametrize("name", CALLS)
def test_training_under_compile(name):
    call = CALLS[name]
    inputs = leaves(5)

    def gradients(function):
        out, lse = function(inputs)
        loss = out.square().sum() + lse.sum()
        return [out, lse, *torch.autograd.grad(loss, inputs, allow_unused=True)]

    compiled = gradients(torch.compile(call, fullgraph=True))
    for a, b in zip(compiled, gradients(call), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_dynamic_shapes_do_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def attend(query, key, value, block_size):
        return cat_attention(query, key, value, block_size=block_size)

    for rows, block in [(40, 9), (77, 17), (130, 33)]:
        query, key, value = torch.randn(3, 1, 2, rows, 8).unbind(0)
        result = attend(query, key, value, block)
        assert torch.equal(result, cat_attention(query, key, value, block_size=block))
    assert counter.frame_count == 1

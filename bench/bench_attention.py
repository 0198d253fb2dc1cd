"""Chunked attention against dense attention, compiled FlexAttention and plain torch.

The rivals compute the same thing (the interleaved mask of ``cat_attention``), except for
"sdpa dense causal": ordinary attention over the N tokens, which the pattern replaces.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from torch_winnow import reference
from torch_winnow.attention import block_diagonal_attention, cat_attention

HEADS, DIM = 8, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2},
}


def inputs(rows, dtype, count=2):
    return [tuple(torch.randn(3, 1, HEADS, rows, DIM).to(dtype).unbind(0)) for _ in range(count)]


def multiply_adds(rows, block):
    """Floating-point operations of the pattern itself: two products over every visible pair."""
    row = torch.arange(rows)
    return float(4 * HEADS * DIM * (row // block + row % block + 1).sum())


def winnow(block):
    return lambda query, key, value: cat_attention(query, key, value, block_size=block)


def plain_torch(block):
    """The same pattern in matmuls: vectors for all rows, blocks by themselves, one softmax."""

    def attend(query, key, value):
        rows, scale = query.shape[2], DIM**-0.5
        blocks = -(-rows // block)
        pad = blocks * block - rows
        q, k, v = (
            F.pad(x, (0, 0, 0, pad)).unflatten(2, (blocks, block)) for x in (query, key, value)
        )
        remote = q.flatten(2, 3) @ k[:, :, :, 0].mT * scale
        earlier = torch.arange(blocks) < torch.arange(blocks * block)[:, None] // block
        remote = remote.masked_fill(~earlier, -torch.inf).unflatten(2, (blocks, block))
        local = q @ k.mT * scale
        local = local.masked_fill(torch.ones(block, block).triu(1).bool(), -torch.inf)
        weights = torch.cat([remote, local], dim=-1).softmax(-1)
        out = (weights[..., :blocks].flatten(2, 3) @ v[:, :, :, 0]).unflatten(2, (blocks, block))
        return (out + weights[..., blocks:] @ v).flatten(2, 3)[:, :, :rows]

    return attend


def flex(block):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # compiled afresh for each shape, or it is timed unfairly slow
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    masks = {}

    def mask(b, h, j, i):
        return (i <= j) & ((i // block == j // block) | (i % block == 0))

    def attend(query, key, value):
        rows = query.shape[2]
        if rows not in masks:
            masks[rows] = create_block_mask(mask, None, None, rows, rows, device="cpu")
        return compiled(query, key, value, block_mask=masks[rows])

    return attend


def dense(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


CAT = {"winnow": winnow, "plain torch": plain_torch, "compiled flex": flex}


def with_gradients(function):
    def run(query, key, value, weight):
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        return torch.autograd.grad(function(*leaves), leaves, weight)

    return run


@pytest.mark.parametrize("impl", [*CAT, "sdpa dense causal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "chunk"), [(4096, 32), (8192, 32), (4096, 8)])
def test_cat_attention(measure, tokens, chunk, dtype, impl):
    block = chunk + 1
    rows = tokens // chunk * block
    if impl in CAT:
        function = CAT[impl](block)
        small = inputs(4 * block + 3, DTYPES[dtype], 1)[0]
        expected = reference.cat_attention(*(x.double() for x in small), block_size=block)
        if impl != "compiled flex":  # one more shape to compile; held to ours below
            torch.testing.assert_close(
                function(*small).double(), expected, **TOLERANCE[DTYPES[dtype]]
            )
        arguments = inputs(rows, DTYPES[dtype])
        torch.testing.assert_close(
            function(*arguments[0]), winnow(block)(*arguments[0]), **TOLERANCE[DTYPES[dtype]]
        )
    else:
        function, arguments = dense, inputs(tokens, DTYPES[dtype])
    measure(
        f"cat_attention forward N={tokens} C={chunk} {dtype}",
        impl,
        function,
        inputs=arguments,
        operations=multiply_adds(rows, block),
        bf16=dtype == "bfloat16",
        rounds=7,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("rule", ["C=32", "C=sqrt(N)"])
def test_cat_attention_growth(measure, rule, tokens, dtype):
    """Time grows as N (C + N/C) where the share of the multiply-add peak does not fall with N."""
    chunk = 32 if rule == "C=32" else math.isqrt(tokens)
    rows = tokens // chunk * (chunk + 1)
    measure(
        f"cat_attention growth {rule} N={tokens} {dtype}",
        "winnow",
        winnow(chunk + 1),
        inputs=inputs(rows, DTYPES[dtype]),
        operations=multiply_adds(rows, chunk + 1),
        bf16=dtype == "bfloat16",
        rounds=5,
    )


@pytest.mark.parametrize("impl", ["winnow", "plain torch", "sdpa dense causal"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "chunk"), [(4096, 32)])
def test_cat_attention_with_gradients(measure, tokens, chunk, dtype, impl):
    block = chunk + 1
    rows = tokens // chunk * block if impl in CAT else tokens
    function = with_gradients(CAT[impl](block) if impl in CAT else dense)
    arguments = [(*x, torch.randn_like(x[0])) for x in inputs(rows, DTYPES[dtype])]
    if impl in CAT:
        ours = with_gradients(winnow(block))(*arguments[0])
        tolerance = {k: 4 * v for k, v in TOLERANCE[DTYPES[dtype]].items()}
        for grad, expected in zip(function(*arguments[0]), ours, strict=True):
            torch.testing.assert_close(grad, expected, **tolerance)
    measure(
        f"cat_attention forward+backward N={tokens} C={chunk} {dtype}",
        impl,
        function,
        inputs=arguments,
        operations=3.5 * multiply_adds(tokens // chunk * block, block),
        bf16=dtype == "bfloat16",
        rounds=5,
    )


def reshaped_sdpa(block):
    def attend(query, key, value):
        q, k, v = (x.unflatten(2, (-1, block)).flatten(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v).unflatten(1, (HEADS, -1)).flatten(2, 3)

    return attend


def bmm_softmax_bmm(block):
    def attend(query, key, value):
        q, k, v = (x.unflatten(2, (-1, block)).flatten(0, 2) for x in (query, key, value))
        weights = torch.bmm(q * DIM**-0.5, k.mT).softmax(-1)
        return torch.bmm(weights, v).view(query.shape)

    return attend


BLOCK_DIAGONAL = {
    "winnow": lambda block: lambda *x: block_diagonal_attention(*x, block_size=block),
    "reshaped sdpa": reshaped_sdpa,
    "bmm softmax bmm": bmm_softmax_bmm,
    "definition": lambda block: lambda *x: reference.block_diagonal_attention(*x, block_size=block),
}


@pytest.mark.parametrize("impl", BLOCK_DIAGONAL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [17, 33])
def test_block_diagonal_attention(measure, block, dtype, impl):
    rows = 4096 // block * block
    function = BLOCK_DIAGONAL[impl](block)
    small = inputs(4 * block, DTYPES[dtype], 1)[0]
    expected = reference.block_diagonal_attention(*(x.double() for x in small), block_size=block)
    torch.testing.assert_close(function(*small).double(), expected, **TOLERANCE[DTYPES[dtype]])
    measure(
        f"block_diagonal_attention N={rows} block={block} {dtype}",
        impl,
        function,
        inputs=inputs(rows, DTYPES[dtype]),
        operations=float(4 * HEADS * DIM * rows * block),
        bf16=dtype == "bfloat16",
        rounds=7,
    )

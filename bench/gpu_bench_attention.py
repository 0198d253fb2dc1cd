"""Chunked attention on the GPU, against compiled FlexAttention with the same mask and dense SDPA.

FlexAttention gets its own best layout, a block mask made once, outside of the timing. Dense SDPA is
ordinary causal attention over the N tokens, which the pattern replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gpu_case import DEVICE, FULL, Case, scaled
from torch_winnow import attention, reference

HEADS, DIM = 16, 128


def with_gradients(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(query, key, value, weight):
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, weight[:, :, : out.shape[2]])

    return run


def flex(block: int, rows: int) -> Callable[..., torch.Tensor]:
    torch._dynamo.reset()  # compiled afresh for each shape, or it is timed unfairly slow
    compiled = torch.compile(flex_attention, dynamic=False) if FULL else flex_attention
    masks: list[Any] = []

    def mask(b, h, j, i):
        return (i <= j) & ((i // block == j // block) | (i % block == 0))

    def attend(query, key, value):
        if not masks:
            masks.append(create_block_mask(mask, None, None, rows, rows, device=str(DEVICE)))
        return compiled(query, key, value, block_mask=masks[0])

    return attend


def cat_attention() -> Iterator[Case]:
    for tokens, chunk, gradients in (
        (4096, 8, False),
        (4096, 32, False),
        (16_384, 32, False),
        (4096, 32, True),
        (16_384, 32, True),
    ):
        tokens = scaled(tokens, 192)
        block = chunk + 1
        rows = tokens // chunk * block

        def make(rows=rows, gradients=gradients) -> tuple:
            shape = (1, HEADS if FULL else 1, rows, DIM)
            count = 4 if gradients else 3
            return tuple(
                torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(count)
            )

        def ours(query, key, value, block=block):
            return attention.cat_attention(query, key, value, block_size=block)

        def dense(query, key, value, tokens=tokens):
            query, key, value = (x[:, :, :tokens] for x in (query, key, value))
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)

        def check(*inputs, ours=ours, block=block) -> None:
            part = [x[:, :1, : 12 * block + 5].contiguous() for x in inputs]
            wide = [x.double().cpu() for x in part]  # definitions make their masks there

            def definition(query, key, value):
                return reference.cat_attention(query, key, value, block_size=block)

            if len(inputs) == 3:
                pairs = [(ours(*part), definition(*wide))]
            else:
                pairs = list(
                    zip(
                        with_gradients(ours)(*part),
                        with_gradients(definition)(*wide),
                        strict=True,
                    )
                )
            for result, expected in pairs:
                torch.testing.assert_close(result.double().cpu(), expected, rtol=4e-2, atol=4e-2)

        rivals = {"sdpa dense causal": dense}
        if FULL or not gradients:  # FlexAttention has no backward on a CPU
            rivals["compiled flex"] = flex(block, rows)
        places = torch.arange(rows)
        pairs_seen = float((places // block + places % block + 1).sum())
        heads = HEADS if FULL else 1
        yield Case(
            f"cat_attention {'forward+backward' if gradients else 'forward'} N={tokens} C={chunk} "
            "bfloat16",
            make,
            with_gradients(ours) if gradients else ours,
            {name: with_gradients(f) if gradients else f for name, f in rivals.items()},
            heads * rows * DIM * 2.0 * (12 if gradients else 4),
            check,
            pairs_seen * heads * DIM * 4.0 * (3.5 if gradients else 1.0),
        )


def close_to(definition: Callable[..., Any], ours: Callable[..., Any], *inputs: torch.Tensor):
    """One head against the definition in float64, which makes its masks on the CPU."""
    part = [x[:, :1].contiguous() for x in inputs]
    expected = definition(*(x.double().cpu() for x in part))
    torch.testing.assert_close(ours(*part).double().cpu(), expected, rtol=4e-2, atol=4e-2)


def chunk_attention() -> Iterator[Case]:
    """Chunks of 64 rows that see a vector of each earlier chunk and the chunk before them."""
    heads, size = HEADS if FULL else 1, scaled(64, 16)
    rows = scaled(4096, 96)
    chunks = rows // size

    def make() -> tuple:
        def random(count: int) -> torch.Tensor:
            return torch.randn(1, heads, count, DIM, device=DEVICE, dtype=torch.bfloat16)

        return random(rows), random(rows), random(rows), random(chunks), random(chunks)

    def ours(*inputs: torch.Tensor) -> torch.Tensor:
        return attention.chunk_attention(*inputs, chunk_size=size, lookback=1)

    def definition(*inputs: torch.Tensor) -> torch.Tensor:
        return reference.chunk_attention(*inputs, chunk_size=size, lookback=1)

    torch._dynamo.reset()
    attend = torch.compile(flex_attention, dynamic=False) if FULL else flex_attention
    masks: list[Any] = []

    def sees(b, h, j, i):  # slots come first
        chunk, local = j // size, i - chunks
        return torch.where(i < chunks, i <= chunk, (local <= j) & (local // size + 1 >= chunk))

    def flex(query, key, value, slot_key, slot_value) -> torch.Tensor:
        if not masks:
            masks.append(
                create_block_mask(sees, None, None, rows, chunks + rows, device=str(DEVICE))
            )
        keys, values = torch.cat([slot_key, key], 2), torch.cat([slot_value, value], 2)
        return attend(query, keys, values, block_mask=masks[0])

    def dense(query, key, value, slot_key, slot_value) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def check(*inputs: torch.Tensor) -> None:
        close_to(definition, ours, *inputs)
        torch.testing.assert_close(flex(*inputs), ours(*inputs), rtol=4e-2, atol=4e-2)

    j = torch.arange(rows)
    seen = float((j // size + 1 + j % size + 1 + size * (j >= size)).sum())
    yield Case(
        f"chunk_attention forward N={rows} C={size} lookback 1, bfloat16",
        make,
        ours,
        {"sdpa dense causal": dense, "compiled flex": flex},
        heads * (4 * rows + 2 * chunks) * DIM * 2.0,
        check,
        seen * heads * DIM * 4.0,
    )


def block_diagonal_attention() -> Iterator[Case]:
    heads, rows, size = HEADS if FULL else 1, scaled(16_384, 128), 32

    def make() -> tuple:
        shape = (1, heads, rows, DIM)
        return tuple(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))

    def ours(*inputs: torch.Tensor) -> torch.Tensor:
        return attention.block_diagonal_attention(*inputs, block_size=size)

    def folded(*inputs: torch.Tensor) -> torch.Tensor:
        """The blocks as a batch, which costs a reshape alone."""
        blocks = (x.view(heads * rows // size, 1, size, DIM) for x in inputs)
        return F.scaled_dot_product_attention(*blocks).view(1, heads, rows, DIM)

    def definition(*inputs: torch.Tensor) -> torch.Tensor:
        part = (x[:, :, : 8 * size] for x in inputs)
        return reference.block_diagonal_attention(*part, block_size=size)

    def first_blocks(*inputs: torch.Tensor) -> torch.Tensor:
        return ours(*inputs)[:, :, : 8 * size]

    yield Case(
        f"block_diagonal_attention forward N={rows} C={size} bfloat16",
        make,
        ours,
        {"sdpa, blocks as a batch": folded},
        heads * rows * DIM * 8.0,
        lambda *inputs: close_to(definition, first_blocks, *inputs),
        rows * size * heads * DIM * 4.0,
    )

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

"""Attention over pages on the GPU beyond plain decoding: quantised pages, and what keys receive."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gpu_case import DEVICE, Case, close, compiled, scaled
from torch_winnow import kvcache

HEADS, KEY_HEADS, DIM, BLOCK = 32, 8, 128, 64


def tables(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = batch * length // BLOCK
    table = torch.randperm(blocks, device=DEVICE).int().view(batch, -1)
    return table, torch.full((batch,), length, dtype=torch.int32, device=DEVICE)


def quantised_decode() -> Iterator[Case]:
    batch, length = scaled(8, 1), scaled(32_768, 256)
    pages = (batch * length // BLOCK, KEY_HEADS, BLOCK, DIM)

    def make() -> tuple:
        query = torch.randn(batch, HEADS, 1, DIM, device=DEVICE, dtype=torch.bfloat16)
        codes = torch.randint(-127, 128, (2, *pages), device=DEVICE, dtype=torch.int8)
        scales = torch.rand(2, *pages[:2], device=DEVICE) / 60
        return query, *codes, *scales, *tables(batch, length)

    def ours(query, key, value, key_scales, value_scales, *where) -> torch.Tensor:
        scales = {"key_scales": key_scales, "value_scales": value_scales}
        return kvcache.paged_attention(query, key, value, *where, **scales)

    def decoded(query, key, value, key_scales, value_scales, table, _) -> torch.Tensor:
        rows = []
        for codes, scales in ((key, key_scales), (value, value_scales)):
            numbers = codes.bfloat16() * scales[..., None, None].bfloat16()
            rows.append(numbers[table.long()].transpose(1, 2).flatten(2, 3))
        return F.scaled_dot_product_attention(query, *rows, enable_gqa=True)

    yield Case(
        f"paged_attention decode B={batch} N={length} int8 pages",
        make,
        ours,
        {"decode + sdpa": decoded, "compiled": compiled(decoded)},
        2.0 * batch * length * KEY_HEADS * DIM,
        close(ours, decoded, 2e-2),
    )


def attention_mass() -> Iterator[Case]:
    """What the last 32 queries give to every key, as an eviction by their attention asks."""
    batch, length, queries = scaled(4, 1), scaled(8192, 256), scaled(32, 4)
    pages = (batch * length // BLOCK, KEY_HEADS, BLOCK, DIM)

    def make() -> tuple:
        query = torch.randn(batch, HEADS, queries, DIM, device=DEVICE, dtype=torch.bfloat16)
        key = torch.randn(pages, device=DEVICE, dtype=torch.bfloat16)
        return query, key, *tables(batch, length)

    def ours(query, key, table, lengths) -> torch.Tensor:
        return kvcache.attention_mass(query, key, table, lengths, causal=False)

    def eager(query, key, table, _) -> torch.Tensor:
        keys = key[table.long()].transpose(1, 2).flatten(2, 3)
        grouped = query.view(batch, KEY_HEADS, -1, DIM)
        scores = grouped @ keys.transpose(2, 3) * DIM**-0.5
        return scores.float().softmax(-1).sum(2)

    yield Case(
        f"attention_mass B={batch} N={length} T={queries} bfloat16",
        make,
        ours,
        {"eager": eager, "compiled": compiled(eager)},
        2.0 * batch * length * KEY_HEADS * DIM,
        close(ours, eager, 5e-2),
        operations=4.0 * batch * HEADS * queries * length * DIM,
    )

"""attention_mass on the GPU, against its definition."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.kvcache import attention_mass

INF, NAN = float("inf"), float("nan")


def make_call(gpu, dtype, *, heads=4, queries=3, block_size=5, dim=40):
    query = torch.randn(3, queries, heads, dim).to(gpu, dtype).transpose(1, 2)
    pages = torch.randn(7, 2, block_size, dim + 3).to(gpu, dtype)[..., :dim]
    table = torch.tensor([[3, 0, 6], [5, 2, -1], [-1] * 3], dtype=torch.int32, device=gpu)
    lengths = torch.tensor([3 * block_size - 2, 2, 0], dtype=torch.int32, device=gpu)
    return query, pages, table, lengths


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window": 4, "sinks": 2}, {"window": 3, "causal": False}]
)
def test_matches_definition(gpu, dtype, options):
    call = make_call(gpu, dtype)
    wide = (call[0].double(), call[1].double(), *call[2:])
    expected = reference.attention_mass(*wide, **options)
    torch.testing.assert_close(
        attention_mass(*call, **options).double(), expected, **TOLERANCE[torch.float32]
    )
    torch.testing.assert_close(
        attention_mass(*wide, **options), expected, **TOLERANCE[torch.float64]
    )


@pytest.mark.parametrize(("heads", "queries", "block_size", "dim"), [(2, 1, 1, 1), (6, 9, 16, 130)])
def test_shapes_and_bias(gpu, heads, queries, block_size, dim):
    call = make_call(
        gpu, torch.float32, heads=heads, queries=queries, block_size=block_size, dim=dim
    )
    call = (*call[:3], call[3].clamp(max=3 * block_size))
    bias = torch.randn(2, block_size, device=gpu)
    bias[1, 0] = -INF
    for options in ({}, {"key_bias": bias}):
        torch.testing.assert_close(
            attention_mass(*call, **options),
            reference.attention_mass(*call, **options),
            rtol=1e-4,
            atol=1e-5,
        )


def test_what_is_not_seen_never_counts(gpu, on_every_order):
    query, pages, table, lengths = make_call(gpu, torch.float32)
    clean = attention_mass(query, pages, table, lengths)
    pages[6, :, 3:] = NAN
    pages[[1, 4]] = INF
    table[1, 1] = 70  # outside of the pages: no tokens
    for result in on_every_order(lambda: attention_mass(query, pages, table, lengths)):
        assert torch.equal(result, clean)
    assert attention_mass(query[:, :, :0], pages, table, lengths).abs().max() == 0

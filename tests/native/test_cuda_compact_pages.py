"""compact_pages_ on the GPU, against its definition."""

from __future__ import annotations

import pytest
import torch

from torch_winnow import reference


def call_of(gpu, dtype, tokens, head_dim, *, layers=2, shared=False):
    """Rows of lists of their own, in blocks of their own; some blocks are no row's."""
    size, heads = 4, 2
    width = -(-tokens // size)
    pages = torch.randn(layers, 4 * width, heads, size, head_dim + 2).to(gpu, dtype)
    table = torch.randperm(4 * width)[: 2 * width].int().view(2, width)
    keep = torch.full((1 if shared else layers, 2, 1 if shared else heads, tokens), -1)
    for row in keep.flatten(0, 2):
        count = int(torch.randint(tokens + 1, ()))
        row[:count] = torch.randperm(tokens)[:count].sort().values
    return pages[..., :head_dim], table.to(gpu), keep.to(gpu)


@pytest.mark.parametrize("head_dim", [8, 5, 300])
@pytest.mark.parametrize("shared", [False, True])
def test_compacts(gpu, dtype, head_dim, shared, on_every_order):
    pages, *rest = call_of(gpu, dtype, 75 if head_dim == 8 else 13, head_dim, shared=shared)
    expected = pages.clone()
    reference.compact_pages_(expected, *rest)

    def compact():
        moved = pages.clone()
        torch.ops.winnow.compact_pages_(moved, *rest)
        return moved

    for result in on_every_order(compact):
        assert torch.equal(result, expected)


def test_indices_from_outside_move_nothing(gpu):
    pages, table, keep = call_of(gpu, torch.float32, 14, 4)
    keep[:, :, :, :6] = torch.tensor([4, 5, 13, 2**40, -1, 1], device=gpu)
    keep[:, :, :, 6:] = torch.tensor([13, 12, 8, 2, -(2**40), 16, 15, 99], device=gpu)
    table[:, 0], table[:, 3] = -7, 99
    before = pages.clone()
    torch.ops.winnow.compact_pages_(pages, table, keep)
    assert torch.equal(pages, before)

"""compact_pages_ on the GPU, against its definition."""

from __future__ import annotations

import pytest
import torch

from torch_winnow import reference


def call_of(gpu, dtype, tokens, head_dim, *, layers=2, shared=False):
    """Rows that write to blocks of their own, some of them those that they read."""
    size, heads = 4, 2
    width = -(-tokens // size)
    pages = torch.randn(layers, 4 * width, heads, size, head_dim + 2).to(gpu, dtype)
    source = torch.randperm(2 * width).int().view(2, width)
    target = source.clone()
    target[0, width // 2] = 2 * width
    target[1] = torch.arange(3 * width, 4 * width)
    keep = torch.full((1 if shared else layers, 2, 1 if shared else heads, tokens), -1)
    for row in keep.flatten(0, 2):
        count = int(torch.randint(tokens + 1, ()))
        row[:count] = torch.randperm(tokens)[:count].sort().values
    return pages[..., :head_dim], source.to(gpu), target.to(gpu), keep.to(gpu)


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
    pages, source, target, keep = call_of(gpu, torch.float32, 6, 4)
    keep[:] = torch.tensor([0, 9, 3, 2**40, -1, 1], device=gpu)
    target[:, 1], source[:, 0] = 99, -7
    before = pages.clone()
    torch.ops.winnow.compact_pages_(pages, source, target, keep)
    assert torch.equal(pages, before)

"""Quantised pages on the GPU, against their definitions: writes bit for bit."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import kvcache, reference
from torch_winnow.reference.quantised import paged_quantise_

codes = pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])


def same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        mine = mine.cpu() if mine.dtype == torch.float32 else mine.cpu().view(torch.uint8)
        other = other if other.dtype == torch.float32 else other.view(torch.uint8)
        assert torch.equal(mine, other)


@codes
def test_writes(gpu, dtype, code, on_every_order):
    heads, size, dims = 2, 4, (37, 8)

    def run():
        torch.manual_seed(0)
        pages = [torch.randint(0, 127, (9, heads, size, d)).char().view(code) for d in dims]
        pages += [torch.rand(9, heads), torch.zeros(9, heads)]
        expected = [x.clone() for x in pages]
        pages = [x.to(gpu) for x in pages]
        table = torch.tensor([[5, 2, -1], [0, 3, 1]], dtype=torch.int32)
        for spread, positions in (
            (1.0, [[0, 1, 2, 3, 4], [11, 2, 99, 3, 3]]),
            (9.0, [[4, 7, -1, 5, 6], [0, 1, 2, 3, 4]]),
            (0.1, [[0, 3, 2, 1, 0], [9, 9, 9, 9, 9]]),
        ):
            new = [(torch.randn(2, 5, heads, d) * spread).to(dtype).transpose(1, 2) for d in dims]
            new[0][1, 0, 1, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
            positions = torch.tensor(positions)
            call = (*new, table, positions)
            torch.ops.winnow.paged_quantise_(*pages, *(x.to(gpu) for x in call))
            known = positions.masked_fill((positions >= 12), -1)
            paged_quantise_(*expected, *new, table, known)
            same(pages, expected)
        return [x.cpu() for x in pages]

    first, *others = on_every_order(run)
    for other in others:
        same(first, other)


@codes
@pytest.mark.parametrize(("head_dim", "group"), [(20, 3), (64, 8), (128, 5), (256, 2)])
def test_attention(gpu, dtype, code, head_dim, group):
    lengths, blocks = torch.tensor([9, 16, 0], dtype=torch.int32), 9
    table = torch.tensor([[4, 0, 8, -1], [3, 2, 1, 5], [-1] * 4], dtype=torch.int32)
    pages = [
        torch.randint(-127, 128, (blocks, 2, 4, d)).to(torch.int8) for d in (head_dim, head_dim)
    ]
    pages = [x if code == torch.int8 else (x / 40).to(code) for x in pages]
    scales = {name: torch.rand(blocks, 2) / 30 for name in ("key_scales", "value_scales")}
    query = torch.randn(3, 2 * group, 2, head_dim).to(dtype)
    for options in (
        {},
        {"window": 5, "sinks": 2, "key_bias": torch.randn(blocks, 1, 4)},
        {"block_indices": torch.tensor([[0, 2], [1, 3], [-1, -1]], dtype=torch.int32)},
    ):
        options = {**options, **scales}
        here = {k: v.to(gpu) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        call = (query, *pages, table, lengths)
        out, lse = kvcache.paged_attention(*(x.to(gpu) for x in call), return_lse=True, **here)
        expected, expected_lse = reference.paged_attention(
            query.double(), *call[1:], return_lse=True, **options
        )
        assert out.dtype == dtype
        torch.testing.assert_close(out.cpu().double(), expected, **TOLERANCE[dtype])
        torch.testing.assert_close(lse.cpu().double(), expected_lse, **TOLERANCE[torch.float32])


@codes
@pytest.mark.parametrize("kind", ["minmax", "mean"])
def test_summaries(gpu, code, kind):
    pages = torch.randint(-127, 128, (5, 2, 4, 7)).to(torch.int8)
    pages = pages if code == torch.int8 else (pages / 40).to(code)
    table, lengths = torch.tensor([[4, 0], [2, -1]], dtype=torch.int32), torch.tensor([6, 4]).int()
    scales = torch.rand(5, 2)
    expected = reference.block_summaries(pages, table, lengths, kind, key_scales=scales)
    call = [x.to(gpu) for x in (pages, table, lengths)]
    ours = kvcache.block_summaries(*call, kind, key_scales=scales.to(gpu))
    torch.testing.assert_close(ours.cpu(), expected)
    kept = torch.zeros(5, 2, *expected.shape[3:], device=gpu)
    positions = torch.tensor([[5, 0], [-1, 1]], device=gpu)
    torch.ops.winnow.update_block_summaries_(kept, *call, positions, scales.to(gpu))
    assert torch.equal(kept[[4, 0]], ours[0].transpose(0, 1))
    assert torch.equal(kept[2], ours[1, :, 0])

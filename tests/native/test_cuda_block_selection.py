"""Summaries, scores and selection of blocks on the GPU, against their definitions."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import kvcache, reference

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("kind", ["minmax", "mean"])
@pytest.mark.parametrize("head_dim", [1, 40])
def test_summaries(gpu, dtype, kind, head_dim):
    pages = torch.randn(7, 2, 5, head_dim + 3).to(gpu, dtype)[..., :head_dim]
    pages[6] = NAN
    table = torch.tensor([[3, 0, -1], [5, 2, 1], [4, -1, -1]], dtype=torch.int32, device=gpu)
    seq_lens = torch.tensor([6, 15, 0], dtype=torch.int32, device=gpu)
    result = kvcache.block_summaries(pages, table, seq_lens, kind)
    expected = reference.block_summaries(pages.double(), table, seq_lens, kind)
    torch.testing.assert_close(result.double(), expected, **TOLERANCE[torch.float32])
    pages[3, 0, 2, 0] = NAN
    assert kvcache.block_summaries(pages, table, seq_lens, kind)[0, 0, 0].isnan().any()
    table[1, 1] = 70
    assert (kvcache.block_summaries(pages, table, seq_lens, kind)[1, :, 1] == 0).all()


@pytest.mark.parametrize("kind", ["minmax", "mean"])
def test_updated_summaries(gpu, dtype, kind, on_every_order):
    """Ascending and scattered positions, more than a warp looks back at; repeated and absent."""
    keys = torch.randn(30, 2, 4, 9).to(gpu, dtype)
    table = torch.randperm(30, device=gpu).int().view(2, 15)
    seq_lens = torch.tensor([59, 50], dtype=torch.int32, device=gpu)
    ascending = torch.arange(2, 50, device=gpu).expand(2, -1)
    scattered = torch.randint(-1, 50, (2, 70), device=gpu)
    sizes = (30, 2, 2, 9) if kind == "minmax" else (30, 2, 9)
    for positions in (ascending, scattered, scattered[:, :0]):

        def update(positions=positions):
            summaries = torch.full(sizes, -7.0, device=gpu)
            torch.ops.winnow.update_block_summaries_(summaries, keys, table, seq_lens, positions)
            return summaries

        results = on_every_order(update)
        expected = torch.full(sizes, -7.0, device=gpu)
        reference.update_block_summaries_(expected, keys, table, seq_lens, positions)
        for result in results:
            torch.testing.assert_close(result, expected, **TOLERANCE[torch.float32])
    # What lies outside of the pages or of the row changes nothing.
    table[0, 0] = 30
    outside = torch.full(sizes, -7.0, device=gpu)
    positions = torch.tensor([[0, 70, 59, -3], [-1] * 4], device=gpu)
    torch.ops.winnow.update_block_summaries_(outside, keys, table, seq_lens - 3, positions)
    assert (outside == -7).all()


@pytest.mark.parametrize("kind", ["minmax", "mean"])
@pytest.mark.parametrize("queries", [1, 3])
def test_scores_and_choice_through_a_table(gpu, dtype, kind, queries):
    summaries = torch.randn((20, 2, 2, 40) if kind == "minmax" else (20, 2, 40), device=gpu)
    table = torch.tensor([[3, 0, 19, 7, 5], [1, -1, -1, -1, -1]], dtype=torch.int32, device=gpu)
    query = torch.randn(2, 6, queries, 40).to(gpu, dtype)
    scores = kvcache.score_blocks(query, summaries, table)
    expected = reference.score_blocks(query.double(), summaries.double(), table)
    torch.testing.assert_close(scores.double(), expected, rtol=2e-5, atol=2e-5)
    seq_lens = torch.tensor([19, 3], dtype=torch.int32, device=gpu)
    for k, sinks, recents in ((3, 1, 1), (2, 0, 0), (7, 1, 1)):
        options = {"seq_lens": seq_lens, "block_size": 4}
        options |= {"sink_blocks": sinks, "recent_blocks": recents}
        chosen = kvcache.score_select_blocks(query, summaries, k, block_table=table, **options)
        assert torch.equal(chosen, kvcache.select_blocks(scores, k, **options))
    table[0, 1] = 20
    assert (kvcache.score_blocks(query, summaries, table)[0, :, 1] == 0).all()


@pytest.mark.parametrize("kind", ["minmax", "mean"])
@pytest.mark.parametrize("queries", [1, 3])
def test_scores(gpu, dtype, kind, queries):
    sizes = (2, 2, 9, 2, 40) if kind == "minmax" else (2, 2, 9, 40)
    summaries = torch.randn(sizes, device=gpu)
    query = torch.randn(2, 6, queries, 40).to(gpu, dtype)
    expected = reference.score_blocks(query.double(), summaries.double())
    torch.testing.assert_close(
        kvcache.score_blocks(query, summaries).double(), expected, rtol=2e-5, atol=2e-5
    )
    assert (kvcache.score_blocks(query[:, :, :0], summaries) == -INF).all()


@pytest.mark.parametrize("width", [1, 12, 300, 700])
@pytest.mark.parametrize(("k", "sinks", "recents"), [(2, 1, 1), (9, 0, 3), (30, 2, 0), (800, 1, 1)])
def test_selection(gpu, width, k, sinks, recents):
    scores = torch.randn(3, 2, width, device=gpu)
    scores[:, 1] = scores[:, 1].round()  # ties
    scores[0, 0, ::5] = NAN
    seq_lens = torch.tensor([16 * width, 16 * width // 2, 0], dtype=torch.int32, device=gpu)
    options = {"block_size": 16, "sink_blocks": sinks, "recent_blocks": recents}
    result = kvcache.select_blocks(scores, k, seq_lens=seq_lens, **options)
    expected = reference.select_blocks(scores.cpu(), k, seq_lens=seq_lens.cpu(), **options)
    assert torch.equal(result.cpu(), expected)


def test_selected_blocks_are_attended(gpu, on_every_order):
    pages = torch.randn(2, 20, 2, 4, 16, device=gpu)
    table = torch.randperm(20, device=gpu).int().view(1, 20)
    seq_lens = torch.tensor([77], dtype=torch.int32, device=gpu)
    query = torch.randn(1, 4, 1, 16, device=gpu)

    def attend():
        summaries = kvcache.block_summaries(pages[0], table, seq_lens)
        scores = kvcache.score_blocks(query, summaries)
        chosen = kvcache.select_blocks(scores, 6, seq_lens=seq_lens, block_size=4)
        return kvcache.paged_attention(
            query, pages[0], pages[1], table, seq_lens, block_indices=chosen
        )

    results = on_every_order(attend)
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].isfinite().all()


def test_errors_name_the_argument(gpu):
    with pytest.raises(ValueError, match="k: expected at least sink_blocks"):
        kvcache.select_blocks(
            torch.randn(1, 1, 4, device=gpu),
            1,
            seq_lens=torch.zeros(1, dtype=torch.int32, device=gpu),
            block_size=4,
        )

"""block_summaries, score_blocks and select_blocks against their definitions, and at their edges."""

from __future__ import annotations

import pytest
import torch

from conftest import TOLERANCE
from torch_winnow import reference
from torch_winnow.kvcache import block_summaries, paged_attention, score_blocks, select_blocks

INF = float("inf")


def pages(dtype, *, heads=2, block_size=16, dim=37):
    """Pages, a block table of scattered blocks, and lengths with a part block and an empty row."""
    key = torch.randn(12, heads, block_size, dim).to(dtype)
    table = torch.tensor([[7, 2, 9, 4], [11, 0, -1, -1], [-1, -1, -1, -1]], dtype=torch.int32)
    lengths = torch.tensor([4 * block_size - 3, block_size + 1, 0], dtype=torch.int32)
    return key, table, lengths


@pytest.mark.parametrize("kind", ["minmax", "mean"])
@pytest.mark.parametrize("dim", [0, 1, 32, 37])
def test_summaries_match_definition(kind, dim, dtype, cpu_capability):
    key, table, lengths = pages(dtype, dim=dim)
    result = block_summaries(key, table, lengths, kind)
    assert result.dtype == torch.float32
    expected = reference.block_summaries(key.double(), table, lengths, kind)
    torch.testing.assert_close(result.double(), expected, **TOLERANCE[torch.float32])
    wide = block_summaries(key.double(), table, lengths, kind)
    torch.testing.assert_close(wide, expected, **TOLERANCE[torch.float64])


def test_summaries_read_only_what_the_row_holds():
    key, table, lengths = pages(torch.float32)
    clean = [block_summaries(key, table, lengths, kind) for kind in ("minmax", "mean")]
    key[4, :, -3:] = float("nan")
    key[0, :, 1:] = INF
    key[[1, 3, 5, 6, 8, 10]] = float("nan")
    dirty = [block_summaries(key, table, lengths, kind) for kind in ("minmax", "mean")]
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    key[7, 0, 5, 3] = float("nan")
    low, high = block_summaries(key, table, lengths)[0, 0, 0, :, 3]
    assert low.isnan()
    assert high.isnan()


def test_summaries_strided():
    key, table, lengths = pages(torch.float32)
    strided = torch.randn(16, 12, 2, 60).permute(1, 2, 0, 3)[..., 7:44].copy_(key)
    wide = torch.full((6, 9), -5, dtype=torch.int32)[::2, :4].copy_(table)
    assert torch.equal(
        block_summaries(strided, wide, lengths), block_summaries(key, table, lengths)
    )


@pytest.mark.parametrize("kind", ["minmax", "mean"])
@pytest.mark.parametrize(("heads", "queries"), [(4, 1), (2, 5), (6, 2)])
def test_scores_match_definition(kind, heads, queries, dtype, cpu_capability):
    key, table, lengths = pages(dtype)
    query = torch.randn(3, queries, heads, 37).to(dtype).transpose(1, 2)
    summaries = block_summaries(key, table, lengths, kind)
    result = score_blocks(query, summaries)
    expected = reference.score_blocks(query.double(), summaries.double())
    torch.testing.assert_close(result.double(), expected, **TOLERANCE[torch.float32])
    wide = score_blocks(query.double(), summaries.double())
    torch.testing.assert_close(wide, expected, **TOLERANCE[torch.float64])


def test_minmax_scores_bound_every_key(dtype):
    """The property that makes them safe to prune with (Quest, equation 1)."""
    key, table, lengths = pages(dtype)
    query = 3 * torch.randn(3, 6, 4, 37).to(dtype)
    scores = score_blocks(query, block_summaries(key, table, lengths)).double()
    for b in range(3):
        for i in range(-(-int(lengths[b]) // 16)):
            count = min(16, int(lengths[b]) - 16 * i)
            for h in range(2):
                products = query[b, 3 * h : 3 * h + 3].double() @ key[table[b, i], h].double().T
                assert scores[b, h, i] >= products[..., :count].max() * (1 - 1e-5) - 1e-5


def test_scores_of_nothing():
    summaries = torch.randn(2, 2, 3, 2, 8)
    assert (score_blocks(torch.randn(2, 4, 0, 8), summaries) == -INF).all()
    assert score_blocks(torch.randn(0, 4, 1, 8), summaries[:0]).shape == (0, 2, 3)
    assert score_blocks(torch.randn(2, 4, 1, 8), summaries[:, :, :0]).shape == (2, 2, 0)


@pytest.mark.parametrize(
    ("k", "sinks", "recents"), [(2, 1, 1), (5, 1, 1), (5, 0, 0), (5, 2, 3), (0, 0, 0), (40, 1, 2)]
)
def test_selection_matches_definition(k, sinks, recents):
    for scores in (torch.randn(5, 3, 20), torch.randint(0, 3, (5, 3, 20)).float()):
        for wide in (scores, scores.double(), scores.transpose(0, 1).contiguous().transpose(0, 1)):
            options = {
                "seq_lens": torch.tensor([320, 317, 33, 1, 0], dtype=torch.int32),
                "block_size": 16,
                "sink_blocks": sinks,
                "recent_blocks": recents,
            }
            result = select_blocks(wide, k, **options)
            assert result.dtype == torch.int32
            assert torch.equal(result, reference.select_blocks(wide, k, **options))


def test_selection_at_its_edges():
    lengths = torch.tensor([6], dtype=torch.int32)

    def select(scores, k):
        options = {"seq_lens": lengths, "block_size": 1, "sink_blocks": 0, "recent_blocks": 0}
        return select_blocks(torch.tensor([[scores]]), k, **options)[0, 0].tolist()

    nan = float("nan")
    assert select([nan, 1.0, nan, 0.0, nan, -INF], 3) == [1, 3, 5]
    assert select([nan] * 6, 2) == [0, 1]
    assert select([-0.0, 0.0, -0.0, 0.0, -1.0, -1.0], 2) == [0, 1]
    assert select([1.0, INF, 3.4e38, -3.4e38, 1e-40, 0.0], 2) == [1, 2]


def test_selected_blocks_go_straight_into_attention():
    key, table, lengths = pages(torch.float32)
    query = torch.randn(3, 4, 1, 37)
    scores = score_blocks(query, block_summaries(key, table, lengths))
    chosen = select_blocks(scores, 3, seq_lens=lengths, block_size=16)
    out = paged_attention(query, key, key, table, lengths, block_indices=chosen)
    expected = reference.paged_attention(query, key, key, table, lengths, block_indices=chosen)
    torch.testing.assert_close(out, expected)
    everything = select_blocks(scores, 4, seq_lens=lengths, block_size=16)
    assert torch.equal(
        paged_attention(query, key, key, table, lengths, block_indices=everything),
        paged_attention(query, key, key, table, lengths),
    )


def test_bitwise_equal_everywhere(dtype, on_every_capability, on_thread_counts):
    key = torch.randn(300, 2, 16, 48).to(dtype)
    table = torch.randperm(300).int().view(2, 150)
    lengths = torch.tensor([2400, 2391], dtype=torch.int32)
    query = torch.randn(2, 4, 2, 48).to(dtype)

    def select():
        summaries = block_summaries(key, table, lengths)
        scores = score_blocks(query, summaries)
        means = score_blocks(query, block_summaries(key, table, lengths, "mean"))
        return scores, means, select_blocks(scores, 20, seq_lens=lengths, block_size=16)

    results = on_every_capability(select) + on_thread_counts(select)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_opcheck_and_compile():
    key, table, lengths = pages(torch.float32)
    query = torch.randn(3, 4, 2, 37)
    ops = torch.ops.winnow
    for minmax in (True, False):
        torch.library.opcheck(ops.block_summaries.default, (key, table, lengths, minmax))
        summaries = ops.block_summaries(key, table, lengths, minmax)
        torch.library.opcheck(ops.score_blocks.default, (query, summaries))
    scores = ops.score_blocks(query, summaries)
    torch.library.opcheck(ops.select_blocks.default, (scores, 3, lengths, 16, 1, 1))

    def step(query, key, table, lengths):
        scores = score_blocks(query, block_summaries(key, table, lengths))
        return select_blocks(scores, 3, seq_lens=lengths, block_size=16)

    compiled = torch.compile(step, fullgraph=True)
    assert torch.equal(compiled(query, key, table, lengths), step(query, key, table, lengths))


def test_errors_name_the_argument():
    key, table, lengths = pages(torch.float32)
    with pytest.raises(ValueError, match="kind: expected 'minmax' or 'mean', got 'median'"):
        block_summaries(key, table, lengths, "median")
    with pytest.raises(ValueError, match=r"seq_lens: .*<= 64 .*got 65 in row 0"):
        block_summaries(key, table, lengths + 4)
    with pytest.raises(ValueError, match=r"block_table: .*< 12 .*got 12 at 0"):
        block_summaries(key, table.clamp_min(12), lengths)
    with pytest.raises(ValueError, match=r"block_table: expected int32, got int64"):
        block_summaries(key, table.long(), lengths)
    with pytest.raises(ValueError, match=r"summaries: expected \(B, Hkv, NB, D\).*D=37"):
        score_blocks(torch.randn(3, 4, 1, 37), torch.randn(3, 2, 4, 36))
    with pytest.raises(ValueError, match=r"summaries: expected float32, got float64"):
        score_blocks(torch.randn(3, 4, 1, 37), torch.randn(3, 2, 4, 37).double())
    with pytest.raises(ValueError, match=r"query: .*key heads \(2\), got 3"):
        score_blocks(torch.randn(3, 3, 1, 37), torch.randn(3, 2, 4, 37))
    scores = torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match=r"k: expected at least .* = 1 \+ 1, got 1"):
        select_blocks(scores, 1, seq_lens=lengths, block_size=16)
    with pytest.raises(ValueError, match=r"k: expected .*got -1"):
        select_blocks(scores, -1, seq_lens=lengths, block_size=16, sink_blocks=0, recent_blocks=0)
    with pytest.raises(ValueError, match=r"sink_blocks: expected at least 0, got -1"):
        select_blocks(scores, 3, seq_lens=lengths, block_size=16, sink_blocks=-1)
    with pytest.raises(ValueError, match=r"scores: expected float32 or float64, got int64"):
        select_blocks(scores.long(), 3, seq_lens=lengths, block_size=16)
    with pytest.raises(ValueError, match=r"seq_lens: .*\(the blocks of scores\)"):
        select_blocks(scores, 3, seq_lens=lengths, block_size=4)

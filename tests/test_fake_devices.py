"""A meta tensor among CPU tensors is refused by every operator: its result would stay unfilled."""

from __future__ import annotations

import pytest
import torch

from torch_winnow._fake import check_same_device
from torch_winnow.attention import (
    block_diagonal_attention,
    cat_attention,
    chunk_attention,
    merge_attention,
)
from torch_winnow.unmasking import logit_stats

X = torch.zeros(1, 2, 4, 8)
META = X.to("meta")
SCORES = torch.zeros(2, 3)
INDICES = torch.zeros(2, 3, dtype=torch.int64)
PAGES = torch.zeros(4, 2, 4, 8)
TABLE = torch.zeros(2, 1, dtype=torch.int32)
LENGTHS = torch.ones(2, dtype=torch.int32)
ops = torch.ops.winnow

# Argument that is moved to meta: call with it.
CALLS = {
    "attention key": lambda: cat_attention(X, META, X, block_size=2),
    "attention value": lambda: block_diagonal_attention(X, X, META, block_size=2),
    "attention slot_key": lambda: chunk_attention(X, X, X, META, X, chunk_size=2),
    "attention cu_seqlens": lambda: chunk_attention(
        X, X, X, X, X, chunk_size=4, cu_seqlens=torch.tensor([0, 4], device="meta")
    ),
    "attention outs[1]": lambda: merge_attention([X, META], [X[..., 0], X[..., 0]]),
    "attention lses[0]": lambda: merge_attention([X, X], [META[..., 0], X[..., 0]]),
    "resampling mask": lambda: ops.resample(
        SCORES, "systematic", None, None, False, SCORES.bool().to("meta"), None, None, 0, None
    ),
    "resampling ancestors": lambda: ops.gather_particles(SCORES, INDICES.to("meta"), 1),
    "tempering log_weights": lambda: ops.next_temperature(
        SCORES, torch.zeros(2), 0.5, 1.0, SCORES.to("meta")
    ),
    "tempering log_increments": lambda: ops.conditional_effective_sample_size(
        SCORES, SCORES.to("meta")
    ),
    "sampling seed": lambda: ops.sample_without_replacement(
        SCORES, 1, "pareto", 0, torch.tensor(0, device="meta")
    ),
    "genealogy indices": lambda: ops.trace_ancestors(INDICES, INDICES[0].to("meta")),
    "in-place ancestors": lambda: ops.gather_particles_(SCORES, INDICES.to("meta"), 1),
    "unmasking mask": lambda: ops.select_positions(
        SCORES, SCORES.bool().to("meta"), 0, 0, 0.5, 1, None, None, None
    ),
    "unmasking target_ids": lambda: logit_stats(SCORES, target_ids=INDICES[:, 0].to("meta")),
    "verification draft_logits": lambda: ops.speculative_verify(
        INDICES, X[0].to("meta"), X[0], 0.0, None, None, None
    ),
    "embedding mask_embedding": lambda: ops.soft_embedding(
        SCORES, SCORES.expand(2, 3), SCORES[0].to("meta"), None, 1.0, None, None, 0.2
    ),
    "kvcache seq_lens": lambda: ops.paged_attention(
        torch.zeros(2, 2, 1, 8), PAGES, PAGES, TABLE, LENGTHS.to("meta")
    ),
    "kvcache block_table": lambda: ops.block_summaries(PAGES, TABLE.to("meta"), LENGTHS),
    "kvcache summaries": lambda: ops.score_blocks(
        torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8, device="meta")
    ),
    "through block_table": lambda: ops.score_blocks(
        torch.zeros(2, 2, 1, 8), PAGES[:, :, 0], TABLE.to("meta")
    ),
    "fused seq_lens": lambda: ops.score_select_blocks(
        torch.zeros(2, 2, 1, 8), PAGES[:, :, 0], 2, LENGTHS.to("meta"), 4, TABLE
    ),
    "update positions": lambda: ops.update_block_summaries_(
        PAGES[:, :, 0].clone(), PAGES, TABLE, LENGTHS, INDICES.to("meta")
    ),
    "mass lse": lambda: ops.attention_mass(
        torch.zeros(2, 2, 1, 8), PAGES, TABLE, LENGTHS, torch.zeros(2, 2, 1, device="meta")
    ),
    "compact keep": lambda: ops.compact_pages_(
        PAGES[None].clone(), TABLE, INDICES[None, :, None].to("meta")
    ),
    "select seq_lens": lambda: ops.select_blocks(torch.zeros(2, 2, 3), 1, LENGTHS.to("meta"), 4),
    "write positions": lambda: ops.paged_write_(
        PAGES, PAGES.clone(), PAGES[:2, :, :1], PAGES[:2, :, :1], TABLE, LENGTHS.to("meta")
    ),
    "copy target": lambda: ops.copy_blocks_(
        PAGES, PAGES.clone(), INDICES[0], INDICES[0].to("meta")
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_meta_among_cpu_tensors(name):
    argument = name.split()[-1].replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=rf"{argument}: expected .* on cpu.* got .* meta"):
        CALLS[name]()


def test_the_first_argument_on_meta_names_the_second():
    with pytest.raises(ValueError, match="key: expected a tensor on meta like query, got one on"):
        cat_attention(META, X, X, block_size=2)


def test_all_on_meta_gives_shapes():
    assert cat_attention(META, META, META, block_size=2).device.type == "meta"
    lengths = torch.tensor([0, 4])  # stays on the CPU for any device of the query
    out = chunk_attention(META, META, META, META, META, chunk_size=4, cu_seqlens=lengths)
    assert out.shape == X.shape


def test_absent_tensors_are_skipped():
    check_same_device(first=None, second=X, third=None)


def test_a_number_on_the_cpu_goes_with_any_device():
    check_same_device(logits=META, seed=torch.tensor(7))
    with pytest.raises(ValueError, match="seed: expected a tensor on cpu like logits"):
        check_same_device(logits=X, seed=torch.tensor(7, device="meta"))

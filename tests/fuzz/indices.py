"""Calls whose index tensors point outside of what they index."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fuzz.operators import Arguments, sound

# Every tensor of an operator that holds indices, lengths or identifiers.
INDICES = {
    "chunk_attention": ("cu_seqlens",),
    "chunk_attention_backward": ("cu_seqlens",),
    "resample": ("pinned",),
    "trace_ancestors": ("ancestors", "indices"),
    "gather_particles": ("ancestors",),
    "gather_particles_": ("ancestors",),
    "logit_stats": ("suppress_ids", "target_ids"),
    "linear_logit_stats": ("suppress_ids", "target_ids"),
    "unmask_step_": ("suppress_ids", "target_ids", "window"),
    "select_positions": ("window", "at_least"),
    "speculative_verify": ("draft_tokens", "lengths", "order"),
    "paged_attention": ("block_table", "seq_lens", "block_indices"),
    "attention_mass": ("block_table", "seq_lens"),
    "paged_write_": ("block_table", "positions"),
    "paged_quantise_": ("block_table", "positions"),
    "copy_blocks_": ("source", "target"),
    "compact_pages_": ("block_table", "keep"),
    "block_summaries": ("block_table", "seq_lens"),
    "update_block_summaries_": ("block_table", "seq_lens", "positions"),
    "score_blocks": ("block_table",),
    "select_blocks": ("seq_lens",),
    "score_select_blocks": ("block_table", "seq_lens"),
}
NAMES = [(name, argument) for name, arguments in INDICES.items() for argument in arguments]
OUTSIDE = (-(2**31), -2, 1000, 2**31 - 1)
OUTSIDE_LONG = (*OUTSIDE, -(2**63), 2**32, 2**63 - 1)


def with_indices(name: str, argument: str, seed: int) -> Arguments:
    """A call that works and whose ``argument`` holds something, for something."""

    def wanted(arguments: Arguments) -> bool:
        value = arguments.get(argument)
        return value is not None and 0 not in (value.numel(), arguments.get("query", value).numel())

    return sound(name, f"{argument} {seed}", wanted)


def pointing_outside(name: str, argument: str) -> Iterator[Arguments]:
    """Calls with one element, or all, replaced; where it is one, at the end of the tensor."""
    long = with_indices(name, argument, 0)[argument].dtype == torch.int64
    for seed, value in enumerate(OUTSIDE_LONG if long else OUTSIDE):
        for everywhere in (False, True):
            arguments = with_indices(name, argument, seed)
            spoiled = arguments[argument].clone()
            spoiled.view(-1)[0 if everywhere else -1 :] = value
            yield arguments | {argument: spoiled}

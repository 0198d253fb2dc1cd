"""Block-sparse decoding: summaries of blocks that grow with the cache, and the choice by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torch_winnow._kvcache.arguments import integer
from torch_winnow.kvcache import PagedKVCache, block_summaries, score_blocks, select_blocks


@dataclass(frozen=True)
class BlockSparse:
    """Decode steps attend ``k`` blocks per key head: sinks, recent ones, the best of the others.

    Steps of a single token in layers without a window are sparse; prompts, chunks of a prompt and
    the verification of several tokens attend everything. With ``k`` blocks or fewer in the cache
    nothing is left out.

    Args:
        k: blocks to attend, at least ``sink_blocks + recent_blocks``.
        sink_blocks: first blocks, always attended.
        recent_blocks: last blocks, always attended; at least 1, the token's own.
        summary: ``"minmax"`` scores a block by an upper bound of its dot products (Quest: Tang et
            al., 2024), ``"mean"`` by its mean key (MoBA: Lu et al., 2025).

    Raises:
        ValueError: on a number or a summary that is not as above.
    """

    k: int
    sink_blocks: int = 1
    recent_blocks: int = 1
    summary: Literal["minmax", "mean"] = "minmax"

    def __post_init__(self) -> None:
        for name, least in (("sink_blocks", 0), ("recent_blocks", 1)):
            if integer(name, getattr(self, name)) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if integer("k", self.k) < self.sink_blocks + self.recent_blocks:
            raise ValueError(
                f"k: expected at least sink_blocks + recent_blocks = "
                f"{self.sink_blocks + self.recent_blocks}, got {self.k}"
            )
        if self.summary not in ("minmax", "mean"):
            raise ValueError(f"summary: expected 'minmax' or 'mean', got {self.summary!r}")


class Summaries:
    """The summary of every block of one layer, by its place in the pool: forks share it too."""

    def __init__(self, sparse: BlockSparse) -> None:
        self.sparse = sparse
        self._blocks: Tensor | None = None

    def refresh(self, cache: PagedKVCache, key_pages: Tensor, tokens: int) -> None:
        """Summarise the blocks that the last ``tokens`` positions of each row touch."""
        size = key_pages.shape[2]
        lengths = cache.seq_lens.long()[:, None]
        first = (lengths - tokens).clamp(min=0) // size
        columns = first + torch.arange((tokens - 1) // size + 2, device=first.device)
        held = columns * size < lengths
        columns = columns.clamp(max=cache.block_table.shape[1] - 1)
        blocks = torch.where(held, cache.block_table.gather(1, columns), -1)
        # Whole blocks lie before the last one, so the touched part of a row is a table of its own.
        fresh = block_summaries(
            key_pages, blocks, (lengths - first * size)[:, 0].int(), self.sparse.summary
        )
        known = self._blocks
        if known is None or known.shape[0] < key_pages.shape[0]:
            self._blocks = fresh.new_zeros(key_pages.shape[0], fresh.shape[1], *fresh.shape[3:])
            if known is not None:
                self._blocks[: known.shape[0]] = known
            known = self._blocks
        known[blocks[held]] = fresh.transpose(1, 2)[held]

    def select(self, query: Tensor, cache: PagedKVCache, block_size: int) -> Tensor | None:
        """The blocks to attend, None for all."""
        if cache.block_table.shape[1] <= self.sparse.k or self._blocks is None:
            return None
        summaries = self._blocks[cache.block_table.clamp(min=0)].transpose(1, 2)
        return select_blocks(
            score_blocks(query, summaries),
            self.sparse.k,
            seq_lens=cache.seq_lens,
            block_size=block_size,
            sink_blocks=self.sparse.sink_blocks,
            recent_blocks=self.sparse.recent_blocks,
        )

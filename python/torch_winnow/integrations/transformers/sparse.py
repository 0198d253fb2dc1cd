"""Block-sparse decoding: the choice of blocks by the summaries that the pool keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from torch_winnow._arguments import integer
from torch_winnow.kvcache import PagedKVCache, score_select_blocks


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
            integer(name, getattr(self, name), least)
        if integer("k", self.k) < self.sink_blocks + self.recent_blocks:
            raise ValueError(
                f"k: expected at least sink_blocks + recent_blocks = "
                f"{self.sink_blocks + self.recent_blocks}, got {self.k}"
            )
        if self.summary not in ("minmax", "mean"):
            raise ValueError(f"summary: expected 'minmax' or 'mean', got {self.summary!r}")

    def select(self, query: Tensor, cache: PagedKVCache, layer: int) -> Tensor | None:
        """The blocks of ``cache`` that a step attends in a layer, None for all."""
        pool = cache.pool
        if cache.block_table.shape[1] <= self.k or pool.summaries is None:
            return None
        return score_select_blocks(
            query,
            pool.summaries[layer],
            self.k,
            seq_lens=cache.seq_lens,
            block_size=pool.block_size,
            block_table=cache.block_table,
            sink_blocks=self.sink_blocks,
            recent_blocks=self.recent_blocks,
        )

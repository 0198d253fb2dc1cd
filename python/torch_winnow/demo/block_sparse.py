"""Long held-out text with all, half and a quarter of the cache's blocks."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from torch_winnow.demo.report import Row, Section
from torch_winnow.kvcache import (
    BlockPool,
    PagedKVCache,
    block_summaries,
    paged_attention,
    score_blocks,
    select_blocks,
)
from torch_winnow.models import DenseDecoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torch_winnow.demo.train import Context

_ROWS = 8
_CONTEXT = 2048
_SCORED = 256
_BLOCK_SIZE = 32
_SHARES = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Outcome:
    """Seconds per token in attention (choosing blocks included), and the text's bits per byte."""

    attention: float
    bits_per_byte: float


class _Attention:
    """Attention over a share of the blocks, timed; a summary of a layer is renewed per block."""

    def __init__(self, cache: PagedKVCache, share: float) -> None:
        self.cache = cache
        self.share = share
        self.seconds = 0.0
        self.dense = True
        self._summaries: dict[int, tuple[int, Tensor]] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache, pool = self.cache, self.cache.pool
        cache.append(layer, key, value)
        start = time.perf_counter()
        pages = (pool.key_pages[layer], pool.value_pages[layer])
        indices = None if self.dense or self.share == 1 else self._choose(layer, query, pages[0])
        out = paged_attention(
            query, *pages, cache.block_table, cache.seq_lens, block_indices=indices
        )
        self.seconds += time.perf_counter() - start
        return out

    def _choose(self, layer: int, query: Tensor, key_pages: Tensor) -> Tensor:
        cache = self.cache
        blocks = math.ceil(int(cache.seq_lens[0]) / _BLOCK_SIZE)
        known = self._summaries.get(layer)
        if known is None or known[0] != blocks:
            # Only the newest block changes between renewals, and that one is always chosen.
            summary = block_summaries(key_pages, cache.block_table, cache.seq_lens)
            known = self._summaries[layer] = (blocks, summary)
        return select_blocks(
            score_blocks(query, known[1]),
            max(2, round(self.share * blocks)),
            seq_lens=cache.seq_lens,
            block_size=_BLOCK_SIZE,
        )


def evaluate(model: DenseDecoder, text: Tensor, share: float) -> Outcome:
    """Reads the text, then scores its last bytes one at a time, as generation would meet them."""
    stack = model.config.decoder
    rows, length = text.shape
    pool = BlockPool(
        rows * math.ceil((length + 1) / _BLOCK_SIZE),
        num_layers=stack.depth,
        num_kv_heads=stack.key_value_heads,
        head_dim=stack.head_dim,
        block_size=_BLOCK_SIZE,
        dtype=torch.float32,
    )
    attend = _Attention(PagedKVCache(pool, rows), share)
    read = length - _SCORED
    hidden = model.stack(model.rows(text[:, :read]), slice(0, read + 1), attend)[:, -1]
    attend.seconds, attend.dense = 0.0, False
    nats = torch.zeros(())
    for position in range(read, length):
        nats += F.cross_entropy(model.head(hidden), text[:, position], reduction="sum")
        if position + 1 < length:
            row = model.embedding(text[:, position : position + 1])
            hidden = model.stack(row, slice(position + 1, position + 2), attend)[:, -1]
    return Outcome(
        attention=attend.seconds / (_SCORED - 1),
        bits_per_byte=nats.item() / math.log(2) / (rows * _SCORED),
    )


def run(context: Context) -> Section:
    text = context.text.held_out_windows(_ROWS, _CONTEXT)
    model = context.models.dense
    outcomes = {}
    with torch.inference_mode():
        for share in tqdm(_SHARES, desc="block-sparse", unit="share"):
            outcomes[share] = evaluate(model, text, share)

    rows = [
        Row(
            setting="all blocks" if share == 1 else f"{share:.0%} of the blocks",
            speed=(
                f"{1e3 * outcome.attention:.2f} ms attention per token "
                f"({outcomes[1.0].attention / outcome.attention:.2f}×)"
            ),
            cost=f"{share:.0%} of keys and values read",
            quality=f"{outcome.bits_per_byte:.3f} bits per byte",
        )
        for share, outcome in outcomes.items()
    ]

    def draw(axis: Axes) -> None:
        shares = [100 * share for share in outcomes]
        axis.plot(shares, [1e3 * o.attention for o in outcomes.values()], "o-", color="#2a7f62")
        axis.set_xlabel("share of the cache's blocks attended to, %")
        axis.set_ylabel("attention time per token, ms", color="#2a7f62")
        axis.set_ylim(bottom=0)
        bits = axis.twinx()
        bits.plot(shares, [o.bits_per_byte for o in outcomes.values()], "s--", color="#b5483a")
        bits.set_ylabel("held-out bits per byte (lower is better)", color="#b5483a")
        axis.set_title("block-sparse cache: time against quality")

    return Section(
        title="block-sparse",
        meaning=(
            f"The dense model reads {_CONTEXT - _SCORED} held-out bytes and predicts the next "
            f"{_SCORED}, one at a time, for {_ROWS} texts. Its memory of the text lies in blocks "
            f"of {_BLOCK_SIZE} bytes. Each step looks at all blocks, or only at the half or "
            "quarter that a cheap upper bound on their relevance ranks first. The time is that "
            "spent in attention, the choice of blocks included; bits per byte say how well the "
            "text was predicted (8 would be a blind guess, lower is better)."
        ),
        rows=rows,
        draw=draw,
    )

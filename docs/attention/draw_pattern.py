"""Draws pattern.png: who sees whom, read off the operators themselves.

    python docs/attention/draw_pattern.py

With one-hot values the output of attention is the matrix of its weights.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from torch_winnow.attention import block_diagonal_attention, cat_attention, chunk_attention

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402

CHUNK, CHUNKS = 4, 4
HIDDEN, TOKEN, VECTOR = range(3)
COLOURS = ("#f4f4f2", "#2a7f62", "#d98c3f")


def seen(attend, queries: int, keys: int) -> Tensor:
    """``(queries, keys)`` bool: where the weights of equal scores are positive."""
    query = torch.zeros(1, 1, queries, keys)
    key, value = torch.zeros(1, 1, keys, keys), torch.eye(keys)[None, None]
    return attend(query, key, value)[0, 0] > 0


def panels() -> list[tuple[str, str, str, Tensor]]:
    """Title, names of rows and columns, and what each cell is."""
    block, tokens = CHUNK + 1, CHUNK * CHUNKS
    rows = block * CHUNKS
    interleaved = seen(lambda *x: cat_attention(*x, block_size=block), rows, rows)
    kind = torch.where(torch.arange(rows) % block == 0, VECTOR, TOKEN)

    def two_sources(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return chunk_attention(
            query,
            key[:, :, CHUNKS:],
            value[:, :, CHUNKS:],
            key[:, :, :CHUNKS],
            value[:, :, :CHUNKS],
            chunk_size=CHUNK,
            lookback=1,
        )

    apart = seen(two_sources, tokens, CHUNKS + tokens)
    source = torch.tensor([VECTOR] * CHUNKS + [TOKEN] * tokens)
    blocks = seen(lambda *x: block_diagonal_attention(*x, block_size=block), rows, rows)
    return [
        (
            f"cat_attention, block_size={block}",
            "rows: a vector, then its block's tokens",
            "the same rows as keys",
            torch.where(interleaved, kind, HIDDEN),
        ),
        (
            f"chunk_attention, chunk_size={CHUNK}, lookback=1",
            "tokens",
            "slots (vectors), then tokens",
            torch.where(apart, source, HIDDEN),
        ),
        (
            f"block_diagonal_attention, block_size={block}",
            "a chunk's rows, its prefix first",
            "the same rows as keys",
            torch.where(blocks, TOKEN, HIDDEN),
        ),
    ]


def main() -> None:
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.3), layout="constrained")
    for axis, (title, rows, columns, cells) in zip(axes, panels(), strict=True):
        axis.pcolormesh(
            cells.flip(0).numpy(),
            cmap=ListedColormap(COLOURS),
            vmin=-0.5,
            vmax=2.5,
            edgecolor="white",
            linewidth=0.8,
        )
        axis.set_aspect("equal")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(rows, fontsize=9)
        axis.set_xlabel(columns, fontsize=9)
        for spine in axis.spines.values():
            spine.set_visible(False)
    path = Path(__file__).with_name("pattern.png")
    figure.savefig(path, dpi=90)
    print(f"written: {path}")


if __name__ == "__main__":
    main()

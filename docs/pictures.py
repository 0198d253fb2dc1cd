"""Draws the family pages' pictures from runs of the operators: ``python docs/pictures.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes

from torch_winnow.kvcache import BlockPool, PagedKVCache
from torch_winnow.resampling import resample
from torch_winnow.unmasking import EntropyThreshold, generate

DOCS = Path(__file__).parent
GREEN, RED, GREY = "#2a7f62", "#b5483a", "#d9d9d9"


def resampling(axis: Axes) -> None:
    """Particles before, drawn as large as they weigh, and the slots that their copies fill."""
    log_weights = torch.randn(16, generator=torch.Generator().manual_seed(4)) * 1.5
    result = resample(log_weights, seed=1)
    axis.scatter(range(16), [1] * 16, s=1500 * log_weights.softmax(0), color=GREEN, zorder=2)
    for slot, ancestor in enumerate(result.ancestors.tolist()):
        axis.plot([ancestor, slot], [1, 0], color=GREY, zorder=1)
    axis.scatter(range(16), [0] * 16, s=1500 / 16, color=GREEN, zorder=2)
    gone = (result.offspring == 0).nonzero().flatten()
    axis.scatter(gone, [1] * len(gone), marker="x", color=RED, zorder=3)
    axis.set_yticks([0, 1], ["after", "before"])
    axis.set_ylim(-0.3, 1.4)
    axis.set_xticks([])
    axis.set_xlabel("16 particles; a cross has no descendant")


def unmasking(axis: Axes) -> None:
    """The call that wrote each position, by threshold, of a model surer near what it knows."""
    length, vocabulary = 48, 32
    noise = torch.randn(length, vocabulary, generator=torch.Generator().manual_seed(0))

    def model(tokens: torch.Tensor) -> torch.Tensor:
        known = tokens[0] != vocabulary - 1
        position = torch.arange(length)
        far = (position[:, None] - position[known]).abs().min(1).values
        sharpness = 9.0 / far.clamp(min=1).sqrt() + 2 * torch.sin(position * 1.3).clamp(min=0)
        return (noise * sharpness[:, None])[None]

    prompt = torch.full((1, length), vocabulary - 1)
    prompt[0, :4] = 0
    thresholds = (0.0, 0.2, 0.5, 1.0)
    rows = [
        generate(model, prompt, mask_id=vocabulary - 1, rule=EntropyThreshold(threshold))
        for threshold in thresholds
    ]
    axis.imshow(torch.cat([row.step_map for row in rows]), aspect="auto", cmap="viridis")
    axis.set_yticks(
        range(len(rows)),
        [f"entropy < {t} nats: {row.calls} calls" for t, row in zip(thresholds, rows, strict=True)],
    )
    axis.set_xlabel("position; the brighter, the later the call that wrote it")


def kvcache(axis: Axes) -> None:
    """The block table of four forks of one prompt: equal numbers are one block."""
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "block_size": 4}
    pool = BlockPool(32, dtype=torch.float32, **shape)
    prompt = PagedKVCache(pool, 1)
    prompt.append(0, *torch.zeros(2, 1, 1, 14, 1))
    forks = prompt.fork([0] * 4)
    prompt.free([0])
    forks.append(0, *torch.zeros(2, 4, 1, 7, 1), lengths=[3, 7, 5, 6])
    table = forks.block_table
    owners = (table[None, None] == table[..., None, None]).sum((2, 3))
    for row, column in (table >= 0).nonzero().tolist():
        shared = owners[row, column] > 1
        ink = "white" if shared else "black"
        box = pyplot.Rectangle((column, -row), 0.94, 0.8, color=GREEN if shared else GREY)
        axis.add_patch(box)
        block = int(table[row, column])
        axis.text(column + 0.47, 0.4 - row, block, ha="center", va="center", color=ink)
    axis.set_xlim(0, table.shape[1])
    axis.set_ylim(-3.2, 1)
    axis.set_yticks([0.4 - row for row in range(4)], [f"fork {row}" for row in range(4)])
    axis.set_xticks([0.47 + c for c in range(table.shape[1])], range(table.shape[1]))
    axis.set_xlabel("logical block; its number in the pool is the text, green is shared")
    axis.spines[:].set_visible(False)


for draw in (resampling, unmasking, kvcache):
    figure, axis = pyplot.subplots(figsize=(8, 2.4), layout="constrained")
    draw(axis)
    figure.savefig(DOCS / draw.__name__ / "picture.png", dpi=110)

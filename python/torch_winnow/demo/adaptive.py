"""One set of weights, every chunk size: what it remembers, how well it predicts, what it costs.

``python -m torch_winnow.demo.adaptive`` trains two small adaptive CATs, prints what was measured
and draws it. Each of the two trainings takes about a minute of one core.

*Recall* is the task where memory alone decides: keys and their values are strewn over a context of
noise, and then every key is asked for. *Text* is the demo's: held-out bytes of the standard
library. There most of a byte is decided by the few before it, which a large chunk shows as they are
and a small one through its vectors; so the bytes that begin a block of the largest chunk are
counted apart: at every chunk size they have nothing but vectors before them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from torch_winnow.demo import generation
from torch_winnow.demo import text as text_module
from torch_winnow.demo.report import write_whole
from torch_winnow.demo.train import CHUNK_SIZES, growing_windows
from torch_winnow.models import CATConfig, CompressAttendTransformer, StackConfig
from torch_winnow.models.training import (
    Recipe,
    bits_per_token,
    fit,
    mixed_precision,
    next_token_loss,
)

if TYPE_CHECKING:
    from torch_winnow.demo.text import Text


@dataclass(frozen=True)
class RecallTask:
    """``pairs`` of a key and its value at random places of a context, then each key and its value.

    Keys come first among the ids, then values, then the noise. Keys stand at even places, so that
    no even chunk size cuts a pair in two.
    """

    context: int = 512
    pairs: int = 32
    keys: int = 32
    values: int = 32
    noise: int = 8

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values + self.noise

    @property
    def length(self) -> int:
        return self.context + 2 * self.pairs

    def texts(self, count: int, generator: torch.Generator) -> Tensor:
        """``(count, length)`` int64."""

        def orders(of: int) -> Tensor:
            return torch.rand(count, of, generator=generator).argsort(1)[:, : self.pairs, None]

        first_noise = self.keys + self.values
        shape = (count, self.context // 2, 2)
        context = torch.randint(first_noise, self.vocab_size, shape, generator=generator)
        values = torch.randint(self.values, (count, self.pairs, 1), generator=generator)
        pairs = torch.cat((orders(self.keys), self.keys + values), dim=2)
        context.scatter_(1, orders(self.context // 2).expand(-1, -1, 2), pairs)
        asked = pairs.gather(1, orders(self.pairs).expand(-1, -1, 2))
        return torch.cat((context.flatten(1), asked.flatten(1)), dim=1)

    def shortened(self, share: int) -> RecallTask:
        """The same ids in a context and with pairs of one ``share``-th."""
        return replace(self, context=self.context // share, pairs=self.pairs // share)

    def answers(self, x: Tensor) -> Tensor:
        """Of texts, or of logits by place, those of the values that are asked for."""
        return x[:, self.context + 1 :: 2]


_TASK = RecallTask()
_STEP_PAIRS = 256  # asked for in each step
_TRIALS = 64
_STEP_BYTES = 2048
_DECODER = StackConfig(width=64, depth=2, heads=2)
_COMPRESSOR = StackConfig(width=64, depth=1, heads=2)


def train_recall(task: RecallTask = _TASK, steps: int = 300) -> CompressAttendTransformer:
    """A small CAT that has learned to recall at every chunk size, one of them per step in turn."""
    config = CATConfig(
        _DECODER,
        _COMPRESSOR,
        CHUNK_SIZES,
        separator=False,
        positions="sequence",
        vocab_size=task.vocab_size,
        max_tokens=task.length,
    )
    recipe = Recipe(steps, matrix_rate=0.03, rate=0.02)

    def loss(model: CompressAttendTransformer, step: int, generator: torch.Generator) -> Tensor:
        # Short contexts first: how to recall is learned sooner where there is less to search.
        progress = step / steps
        here = task.shortened(8 if progress < 0.4 else 4 if progress < 0.6 else 1)
        texts = here.texts(_STEP_PAIRS // here.pairs, generator)
        logits = model(texts, chunk_size=CHUNK_SIZES[step % len(CHUNK_SIZES)])
        return next_token_loss(here.answers(logits), here.answers(texts))

    return _train("recall", config, recipe, loss)


def train_text(text: Text, steps: int = 240) -> CompressAttendTransformer:
    """A small CAT that predicts bytes of text at every chunk size."""
    config = CATConfig(_DECODER, _COMPRESSOR, CHUNK_SIZES, positions="sequence")
    recipe = Recipe(steps, matrix_rate=0.04, rate=0.03)

    def loss(model: CompressAttendTransformer, step: int, generator: torch.Generator) -> Tensor:
        tokens = growing_windows(text, _STEP_BYTES, step / steps, generator)
        return next_token_loss(
            model(tokens, chunk_size=CHUNK_SIZES[step % len(CHUNK_SIZES)]), tokens
        )

    return _train("text", config, recipe, loss)


def _train(
    name: str,
    config: CATConfig,
    recipe: Recipe,
    loss: Callable[[CompressAttendTransformer, int, torch.Generator], Tensor],
) -> CompressAttendTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CompressAttendTransformer(config)
    generator = torch.Generator().manual_seed(1)
    with tqdm(total=recipe.steps, desc=f"training {name}", unit="step") as bar:
        fit(
            model,
            lambda step: loss(model, step, generator),
            recipe,
            report=lambda step, loss: bar.update(),
        )
    return model


@torch.inference_mode()
def recall(model: CompressAttendTransformer, task: RecallTask = _TASK) -> dict[int, Tensor]:
    """By chunk size, the share of values that each of the trial texts recalls ``(trials,)``."""
    texts = task.texts(_TRIALS, torch.Generator().manual_seed(2))
    shares = {}
    for size in model.config.chunk_sizes:
        with mixed_precision():
            found = task.answers(model(texts, chunk_size=size)).argmax(-1)
        shares[size] = (found == task.answers(texts)).float().mean(1)
    return shares


@torch.inference_mode()
def bits_from_vectors(model: CompressAttendTransformer, windows: Tensor) -> dict[int, float]:
    """By chunk size, bits per byte of the bytes that begin a chunk at every size."""
    sizes = model.config.chunk_sizes
    places = torch.arange(max(sizes), windows.shape[1], max(sizes))
    bits = {}
    for size in sizes:
        nats = []
        for window in windows:
            logits = model(window[None], chunk_size=size)[:, places]
            nats.append(next_token_loss(logits, window[None, places]).item())
        bits[size] = bits_per_token(sum(nats) / len(nats))
    return bits


@dataclass(frozen=True)
class Measured:
    """By chunk size: what the plot shows."""

    recalled: dict[int, Tensor]
    bits: dict[int, float]
    vector_bits: dict[int, float]
    cache_bytes: dict[int, int]
    seconds_per_byte: dict[int, float]


def measure(
    cat: CompressAttendTransformer,
    memory: CompressAttendTransformer,
    text: Text,
    task: RecallTask = _TASK,
) -> Measured:
    outcomes = generation.measure(generation.cat_contenders(cat), text)
    by_size = dict(zip(cat.config.chunk_sizes, outcomes.values(), strict=True))
    windows = text.held_out_windows(generation.WINDOWS, generation.WINDOW)
    return Measured(
        recalled=recall(memory, task),
        bits={size: o.bits_per_byte.mean().item() for size, o in by_size.items()},
        vector_bits=bits_from_vectors(cat, windows),
        cache_bytes={size: o.cache_bytes for size, o in by_size.items()},
        seconds_per_byte={size: 1 / o.tokens_per_second for size, o in by_size.items()},
    )


def table(measured: Measured) -> str:
    from tabulate import tabulate

    lines = []
    for size, recalled in measured.recalled.items():
        error = recalled.std().item() / len(recalled) ** 0.5
        lines.append(
            (
                size,
                f"{recalled.mean():.1%} ± {error:.1%}",
                f"{measured.bits[size]:.2f}",
                f"{measured.vector_bits[size]:.2f}",
                f"{measured.cache_bytes[size] / 1024:,.0f} KiB",
                f"{1e3 * measured.seconds_per_byte[size]:.2f} ms",
            )
        )
    headers = (
        "chunk size",
        "values recalled",
        "bits per byte of text",
        "of bytes with only vectors before them",
        "cache per text",
        "time per byte",
    )
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def draw(measured: Measured, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, (memory, prediction, cost) = pyplot.subplots(
        1, 3, figsize=(12, 3.6), layout="constrained"
    )
    sizes = list(measured.recalled)
    places = range(len(sizes))
    shares = [100 * measured.recalled[size].mean().item() for size in sizes]
    memory.plot(places, shares, "o-", color="#2a7f62")
    memory.set_ylim(0, 102)
    memory.set_ylabel("values recalled, %")
    memory.set_title("memory: small chunks recall more", fontsize=10)
    for bits, style, colour, label in (
        (measured.bits, "s--", "#b5483a", "all bytes"),
        (measured.vector_bits, "o-", "#d98c3f", "bytes with only vectors before them"),
    ):
        prediction.plot(places, [bits[size] for size in sizes], style, color=colour, label=label)
    prediction.set_ylabel("held-out bits per byte (lower is better)")
    prediction.set_title("text: small chunks where memory decides", fontsize=10)
    prediction.legend(fontsize=8)
    kib = [measured.cache_bytes[size] / 1024 for size in sizes]
    cost.bar(places, kib, 0.55, color="#9bc4b5")
    cost.set_ylabel("KiB of cache per text", color="#2a7f62")
    time = cost.twinx()
    milliseconds = [1e3 * measured.seconds_per_byte[size] for size in sizes]
    time.plot(places, milliseconds, "o-", color="#444444")
    time.set_ylim(bottom=0)
    time.set_ylabel("ms per generated byte")
    cost.set_title("cost: large chunks are cheap", fontsize=10)
    for axis in (memory, prediction, cost):
        axis.set_xticks(list(places), [str(size) for size in sizes])
        axis.set_xlabel("chunk size, chosen at the call")
    write_whole(path, lambda target: canvas.savefig(target, dpi=90, format="png"))
    pyplot.close(canvas)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m torch_winnow.demo.adaptive",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(".demo"),
        help="where the table and the picture go (default: %(default)s)",
    )
    folder: Path = parser.parse_args(arguments).folder
    text = text_module.load()
    measured = measure(train_text(text), train_recall(), text)
    lines = table(measured)
    write_whole(folder / "adaptive.md", lambda path: path.write_text(lines + "\n"))
    draw(measured, folder / "adaptive.png")
    print(f"\n{lines}\n\nwritten: {folder / 'adaptive.md'}, {folder / 'adaptive.png'}")


if __name__ == "__main__":
    main()

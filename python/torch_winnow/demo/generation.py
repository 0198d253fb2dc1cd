"""Generating with a CAT at several chunk sizes against a dense decoder of its width."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from torch_winnow.demo.report import Row, Section
from torch_winnow.demo.train import bytes_read
from torch_winnow.models import CompressAttendTransformer, Decoding, sample
from torch_winnow.models.training import bits_per_token, next_token_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torch_winnow.demo.text import Text
    from torch_winnow.demo.train import Context, Models

_BATCH = 16
_PROMPT = 2048
_ROUNDS = 6
_ROUND_TOKENS = 64  # whole chunks of every size, so that each pays for all its compressions
WINDOWS = 32
WINDOW = 2048


@dataclass(frozen=True)
class Contender:
    """A model at one setting: how it starts to generate, and what it makes of text."""

    name: str
    start: Callable[[Tensor, int], Decoding]
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """Speed of the whole batch, cache of one sequence, and bits per byte of each window."""

    tokens_per_second: float
    cache_bytes: int
    bits_per_byte: Tensor


def contenders_of(models: Models) -> list[Contender]:
    """The dense decoder first, then the CAT at each of its chunk sizes."""
    dense = models.dense

    def start(prompt: Tensor, new_tokens: int) -> Decoding:
        return dense.start(prompt, dense.block_pool(len(prompt), prompt.shape[1] + new_tokens))

    return [Contender("dense", start, dense), *cat_contenders(models.cat)]


def cat_contenders(cat: CompressAttendTransformer) -> list[Contender]:
    """One model at each of its chunk sizes."""

    def cat_at(size: int) -> Contender:
        def start(prompt: Tensor, new_tokens: int) -> Decoding:
            total = prompt.shape[1] + new_tokens
            pool = cat.block_pool(len(prompt), total, chunk_size=size)
            return cat.start(prompt, pool, chunk_size=size)

        return Contender(f"CAT, chunks of {size}", start, lambda text: cat(text, chunk_size=size))

    return [cat_at(size) for size in cat.config.chunk_sizes]


@torch.inference_mode()
def measure(contenders: list[Contender], text: Text) -> dict[str, Outcome]:
    """Speed and cache at the prompt's length and beyond; bits per byte of held-out windows."""
    prompt = text.held_out_windows(_BATCH, _PROMPT)
    new_tokens = (_ROUNDS + 1) * _ROUND_TOKENS
    decodings = {c.name: c.start(prompt, new_tokens) for c in contenders}
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    for turn in tqdm(range(_ROUNDS + 1), desc="generation", unit="round"):
        # In turns, so that whatever else the machine does meets everyone alike.
        for name, decoding in decodings.items():
            generator = torch.Generator().manual_seed(turn)
            start = time.perf_counter()
            tokens = sample(decoding, _ROUND_TOKENS, generator=generator)
            decoding.step(tokens[:, -1])
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)

    windows = text.held_out_windows(WINDOWS, WINDOW)
    outcomes = {}
    for contender in tqdm(contenders, desc="bits per byte", unit="model"):
        nats = [
            next_token_loss(contender.logits(window[None]), window[None]).item()
            for window in windows
        ]
        name = contender.name
        outcomes[name] = Outcome(
            tokens_per_second=_BATCH * _ROUND_TOKENS / statistics.median(seconds[name]),
            cache_bytes=decodings[name].cache_bytes // _BATCH,
            bits_per_byte=torch.tensor([bits_per_token(value) for value in nats]),
        )
    return outcomes


def run(context: Context) -> Section:
    outcomes = measure(contenders_of(context.models), context.text)
    dense = outcomes["dense"]
    rows = []
    for name, outcome in outcomes.items():
        bits = outcome.bits_per_byte
        faster = smaller = compared = ""
        if outcome is not dense:
            faster = f" ({outcome.tokens_per_second / dense.tokens_per_second:.1f}×)"
            smaller = f" ({dense.cache_bytes / outcome.cache_bytes:.1f}× smaller)"
            difference = bits - dense.bits_per_byte
            noise = difference.std() / len(difference) ** 0.5
            compared = f" ({difference.mean():+.2f} ± {noise:.2f})"
        rows.append(
            Row(
                setting=name,
                speed=f"{outcome.tokens_per_second:,.0f} bytes/s{faster}",
                cost=f"{outcome.cache_bytes / 1024:,.0f} KiB of cache per text{smaller}",
                quality=f"{bits.mean():.2f} bits per byte{compared}",
            )
        )
    return Section(
        title="generation",
        meaning=(
            f"{_BATCH} texts of {_PROMPT} held-out bytes are continued together, byte by byte. A "
            "dense decoder keeps keys and values of every byte and looks at all of them for each "
            "new one. The Compress & Attend Transformer (CAT) keeps one vector per finished chunk "
            "and the bytes of the current one; the chunk size is chosen when it is called, and all "
            "its lines come from one set of weights. Both have decoders of the same width and "
            "depth, read the cache with the same operator and trained for about as long, in which "
            f"the dense decoder read {bytes_read('dense') / 1e6:.1f} MB of text and the CAT "
            f"{bytes_read('cat') / 1e6:.1f} MB, each chunk size in its turn. Bits per byte say how "
            f"well held-out text is predicted, in {WINDOWS} windows of {WINDOW} (8 would be a "
            "blind guess, lower is better), with the difference to the dense decoder and its "
            "standard error. Small chunks lean most on the vectors, which take longest to learn: "
            "after a training as short as this one they need not predict better than large ones. "
            f"Speeds are medians of {_ROUNDS} rounds in alternation."
        ),
        rows=rows,
        draw=lambda axis: draw(axis, outcomes),
    )


def draw(axis: Axes, outcomes: dict[str, Outcome]) -> None:
    """Speed as bars, bits per byte as a line, cache in the labels."""
    labels = [
        f"{name.replace(', chunks of ', ' ')}\n{outcome.cache_bytes / 1024:,.0f} KiB"
        for name, outcome in outcomes.items()
    ]
    places = range(len(outcomes))
    axis.bar(places, [o.tokens_per_second for o in outcomes.values()], 0.6, color="#9bc4b5")
    axis.set_xticks(list(places), labels, fontsize=8)
    axis.set_xlabel("decoder and chunk size; cache per text")
    axis.set_ylabel("bytes generated per second", color="#2a7f62")
    bits = axis.twinx()
    means = [o.bits_per_byte.mean().item() for o in outcomes.values()]
    bits.plot(places, means, "s--", color="#b5483a")
    bits.set_ylabel("held-out bits per byte (lower is better)", color="#b5483a")
    axis.set_title(f"generation at {_PROMPT} bytes of context and more")

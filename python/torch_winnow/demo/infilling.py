"""Infilling held-out text: one position per model call against several at once, by entropy."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from torch_winnow import unmasking
from torch_winnow.demo.report import Row, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from torch_winnow.demo.train import Context

_WINDOWS = 24
_LENGTH = 256
_MASKED_SHARE = 0.4
_MEAN_SPAN = 8

_ONE_AT_A_TIME = "one position per call"
_RULES: dict[str, unmasking.TopK | unmasking.EntropyThreshold] = {
    _ONE_AT_A_TIME: unmasking.TopK(1, score="entropy"),
    "entropy < 0.05 nats": unmasking.EntropyThreshold(0.05),
    "entropy < 0.2 nats": unmasking.EntropyThreshold(0.2),
    "entropy < 0.5 nats": unmasking.EntropyThreshold(0.5),
    "entropy < 1 nat": unmasking.EntropyThreshold(1.0),
    "any entropy (one call)": unmasking.EntropyThreshold(1e9),
}


def windows_of(text: Tensor, generator: torch.Generator) -> Tensor:
    """``(windows, length)`` pieces of the text at random places."""
    starts = torch.randint(len(text) - _LENGTH, (_WINDOWS, 1), generator=generator)
    return text[starts + torch.arange(_LENGTH)].long()


def span_mask(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """``(rows, length)`` bool: spans of geometric length that hide about the wanted share.

    Every row hides the same number of bytes, so that one position per call needs the same number of
    calls everywhere.
    """
    rows, length = shape
    wanted = round(length * _MASKED_SHARE)
    hidden = torch.zeros(shape, dtype=torch.bool)
    for row in hidden:
        while (missing := wanted - int(row.sum())) > 0:
            start = int(torch.randint(length, (), generator=generator))
            span = 1 + int(torch.empty(()).geometric_(1 / _MEAN_SPAN, generator=generator))
            free = (~row[start : start + span]).nonzero().flatten()[:missing]
            row[start + free] = True
    return hidden


def run(context: Context) -> Section:
    model, mask_id = context.models.diffusion, context.models.diffusion.mask_id
    generator = torch.Generator().manual_seed(0)
    truth = windows_of(context.text.held_out, generator)
    hidden = span_mask((_WINDOWS, _LENGTH), generator)
    given = torch.where(hidden, mask_id, truth)

    right: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    seconds: dict[str, float] = {}
    with torch.inference_mode():
        model(given)  # warm up
        for name, rule in tqdm(_RULES.items(), desc="infilling", unit="rule"):
            start = time.perf_counter()
            result = unmasking.generate(model, given, mask_id=mask_id, rule=rule)
            seconds[name] = time.perf_counter() - start
            calls[name] = int(result.calls)
            hits = ((result.tokens == truth) & hidden).sum(1)
            right[name] = hits / hidden.sum(1)

    rows = []
    for name in _RULES:
        difference = right[name] - right[_ONE_AT_A_TIME]
        noise = difference.std().item() / _WINDOWS**0.5
        compared = (
            ""
            if name == _ONE_AT_A_TIME
            else f" ({100 * difference.mean():+.1f} ± {100 * noise:.1f} points)"
        )
        rows.append(
            Row(
                setting=name,
                speed=f"{seconds[name]:.2f} s",
                cost=f"{calls[name]} model calls",
                quality=f"{100 * right[name].mean():.1f}% of hidden bytes right{compared}",
            )
        )

    def draw(axis: Axes) -> None:
        accuracy = [100 * right[name].mean().item() for name in _RULES]
        axis.plot([calls[name] for name in _RULES], accuracy, "o-", color="#2a7f62")
        for name, share in zip(_RULES, accuracy, strict=True):
            axis.annotate(
                name, (calls[name], share), fontsize=7, xytext=(4, -8), textcoords="offset points"
            )
        axis.set_xscale("log")
        axis.set_xlabel("model calls for the whole infilling (log scale)")
        axis.set_ylabel("hidden bytes recovered exactly, %")
        axis.set_title("unmasking: fewer calls at equal accuracy")

    return Section(
        title="unmasking",
        meaning=(
            f"In {_WINDOWS} windows of {_LENGTH} bytes that the models never saw, "
            f"{_MASKED_SHARE:.0%} of the bytes are hidden in short spans, and a masked diffusion "
            "model fills them in. Filling one byte per model call is the careful way. "
            "Entropy decoding fills, in each call, every byte about which the model is sure enough "
            "(its entropy lies under the threshold). Fewer calls are faster; the accuracy is the "
            "share of hidden bytes recovered exactly, with the difference to the careful way and "
            "its standard error over the windows."
        ),
        rows=rows,
        draw=draw,
    )

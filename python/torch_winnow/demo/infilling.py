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
_HIDDEN_SHARE = 0.3

_ONE_AT_A_TIME = "one position per call"
_RULES: dict[str, unmasking.TopK | unmasking.EntropyThreshold] = {
    _ONE_AT_A_TIME: unmasking.TopK(1, score="entropy"),
    "entropy < 0.2 nats": unmasking.EntropyThreshold(0.2),
    "entropy < 0.5 nats": unmasking.EntropyThreshold(0.5),
    "entropy < 1 nat": unmasking.EntropyThreshold(1.0),
    "entropy < 2 nats": unmasking.EntropyThreshold(2.0),
    "any entropy (one call)": unmasking.EntropyThreshold(1e9),
}


def hidden_bytes(generator: torch.Generator) -> Tensor:
    """``(windows, length)`` bool: the same number of random positions in every window.

    So one position per call needs the same number of calls everywhere.
    """
    order = torch.rand((_WINDOWS, _LENGTH), generator=generator).argsort(dim=1)
    return order < round(_LENGTH * _HIDDEN_SHARE)


def run(context: Context) -> Section:
    model, mask_id = context.models.diffusion, context.models.diffusion.mask_id
    truth = context.text.held_out_windows(_WINDOWS, _LENGTH)
    hidden = hidden_bytes(torch.Generator().manual_seed(0))
    given = torch.where(hidden, mask_id, truth)

    right: dict[str, Tensor] = {}
    calls: dict[str, float] = {}
    seconds: dict[str, float] = {}
    with torch.inference_mode():
        model(given[:1])  # warm up
        for name, rule in tqdm(_RULES.items(), desc="infilling", unit="rule"):
            start = time.perf_counter()
            # One window at a time: in a batch the slowest window would set everyone's calls.
            results = [
                unmasking.generate(model, window, mask_id=mask_id, rule=rule)
                for window in given.unsqueeze(1)
            ]
            seconds[name] = (time.perf_counter() - start) / _WINDOWS
            calls[name] = sum(int(result.calls) for result in results) / _WINDOWS
            tokens = torch.cat([result.tokens for result in results])
            right[name] = ((tokens == truth) & hidden).sum(1) / hidden.sum(1)

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
                speed=f"{1e3 * seconds[name]:.0f} ms per window",
                cost=f"{calls[name]:.1f} model calls per window",
                quality=f"{100 * right[name].mean():.1f}% of hidden bytes right{compared}",
            )
        )

    def draw(axis: Axes) -> None:
        accuracy = [100 * right[name].mean().item() for name in _RULES]
        axis.plot(list(calls.values()), accuracy, "-", color="#9bc4b5", zorder=1)
        for name, share, marker in zip(_RULES, accuracy, "os^vDP", strict=True):
            axis.plot(calls[name], share, marker, markersize=8, label=name)
        axis.set_xscale("log")
        axis.set_xlabel("model calls per window (log scale)")
        axis.set_ylabel("hidden bytes recovered exactly, %")
        axis.set_title("unmasking: fewer calls at equal accuracy")
        axis.legend(fontsize=8)

    return Section(
        title="unmasking",
        meaning=(
            f"In {_WINDOWS} windows of {_LENGTH} bytes that the models never saw, "
            f"{_HIDDEN_SHARE:.0%} of the bytes are hidden at random, and a masked diffusion model "
            "fills them in. Filling one byte per model call is the careful way. "
            "Entropy decoding fills, in each call, every byte about which the model is sure enough "
            "(its entropy lies under the threshold). Fewer calls are faster; the accuracy is the "
            "share of hidden bytes recovered exactly, with the difference to the careful way and "
            "its standard error over the windows. Bytes filled in one call do not know of each "
            "other; a share of single bytes hardly notices, so one call for everything scores well "
            "here and would not make a good text."
        ),
        rows=rows,
        draw=draw,
    )

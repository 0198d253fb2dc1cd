"""Definitions of :mod:`torch_winnow.unmasking`. Give float64 logits for an oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_winnow._unmasking.history_rules import DecodingRule
from torch_winnow._unmasking.logit_stats import LogitStats
from torch_winnow._unmasking.results import (
    AnswerEntropy,
    GenerateResult,
    StepContext,
    StepResult,
)
from torch_winnow._unmasking.rules import Rule
from torch_winnow.reference._history import history_of
from torch_winnow.reference._selection import select_positions
from torch_winnow.reference.logit_stats import (
    linear_logit_stats,
    logit_stats,
    merge_logit_stats,
)

__all__ = [
    "generate",
    "linear_logit_stats",
    "logit_stats",
    "merge_logit_stats",
    "select_positions",
    "unmask_step_",
]


def _confidence(stats: LogitStats, rule: DecodingRule) -> Tensor:
    return {
        "entropy": stats.entropy,
        "margin": stats.margin,
        "confidence": torch.where(
            stats.token == stats.argmax, stats.max_prob, stats.log_prob.exp()
        ),
        "random": torch.where(stats.entropy.isnan(), math.nan, torch.rand(stats.entropy.shape)),
    }[rule.score]


def _without_mask(options: dict[str, Any], mask_id: int, vocab: int) -> dict[str, Any]:
    ids = options.get("suppress_ids")
    suppressed = [] if ids is None else [int(i) for i in ids]
    own = [mask_id] if 0 <= mask_id < vocab else []
    return {**options, "suppress_ids": suppressed + own}


def unmask_step_(
    tokens: Tensor,
    logits: Tensor,
    *,
    mask_id: int,
    rule: Rule,
    window: Tensor | None = None,
    step: int = 0,
    **logit_stats_options: Any,
) -> StepResult:
    """See :func:`torch_winnow.unmasking.unmask_step_`."""
    masked = tokens == mask_id
    narrowed = logit_stats_options.pop("mask", None)
    if narrowed is not None:
        masked = masked & narrowed
    if window is not None:
        position = torch.arange(tokens.shape[1])
        masked = masked & (position >= window[:, :1]) & (position < window[:, 1:])
    options = _without_mask(logit_stats_options, mask_id, logits.shape[-1])
    stats = logit_stats(logits, mask=masked, **options)
    transfer, _ = select_positions(_confidence(stats, rule), masked, rule, step=step)
    return _write(tokens, transfer, stats)


def _write(tokens: Tensor, transfer: Tensor, stats: LogitStats) -> StepResult:
    transfer = transfer & (stats.token >= 0)
    tokens[transfer] = stats.token[transfer].to(tokens.dtype)
    return StepResult(transfer, transfer.sum(1), stats)


def generate(
    model: Callable[..., Any],
    tokens: Tensor,
    *,
    mask_id: int,
    rule: DecodingRule,
    block_length: int | None = None,
    sliding: bool = False,
    steps: int | None = None,
    stop: AnswerEntropy | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    context: bool = False,
    progress: bool = False,
    **logit_stats_options: Any,
) -> GenerateResult:
    """See :func:`torch_winnow.unmasking.generate`: rows one by one, a call for every step.

    Draws follow the same distribution as the operator's, not the same numbers.
    """
    tokens = tokens.clone()
    batch, length = tokens.shape
    step_map = torch.full(tokens.shape, -1)
    entropies = torch.zeros(tokens.shape)
    position = torch.arange(length)
    if seed is not None:
        generator = torch.Generator().manual_seed(int(seed))
    block_length = min(block_length or max(1, length), max(1, length))
    given = tokens != mask_id
    guided = bool(logit_stats_options.get("cfg_scale"))
    calls = 0
    for b in range(batch):
        row = tokens[b : b + 1]
        answer = torch.zeros_like(row, dtype=torch.bool)
        if stop is not None:
            answer = stop.positions.expand(tokens.shape)[b : b + 1]
        history = history_of(rule, length, generator)
        changed = torch.ones_like(row, dtype=torch.bool)
        masks = (row[0] == mask_id).nonzero()[:, 0].tolist()
        start = masks[0] if masks else 0
        call = step = 0
        while bool((row == mask_id).any()) or 0 < step < history.steps:
            masked = row == mask_id
            window = (position >= start) & (position < start + block_length)
            in_block = masked & window
            written = window & ~masked & ~given[b]
            time = history.begin(int(in_block.sum()), step)
            asked = tokens
            if guided:
                asked = torch.cat([tokens, tokens.masked_fill(given, mask_id)])
            about = StepContext(
                torch.tensor([[start, min(start + block_length, length)]]).expand(batch, 2),
                changed.expand(tokens.shape),
                torch.ones(batch, dtype=torch.bool),
                None if time is None else torch.full((batch,), time, dtype=torch.float64),
                mask_id,
                block_length,
            )
            logits = model(asked, about) if context else model(asked)
            logits = getattr(logits, "logits", logits)
            unconditional = logits[batch + b :][:1] if guided else None
            logits = logits[b : b + 1]
            stats = logit_stats(
                logits,
                mask=in_block | written | (masked & answer),
                generator=generator,
                unconditional_logits=unconditional,
                previous_logits=history.previous_logits(logits),
                target_ids=row.clamp(0, logits.shape[-1] - 1),
                **_without_mask(logit_stats_options, mask_id, logits.shape[-1]),
            )
            left = int(in_block.sum())
            least = 1 if steps is None else math.ceil(left / max(1, steps - step))
            transfer, remask = history.choose(
                _confidence(stats, rule), stats, in_block, written, step, least
            )
            pending = masked & answer
            gamma = -math.inf if stop is None or not answer.any() else stop.gamma
            ends = bool(stats.entropy[pending].sum() < gamma)
            if ends:
                transfer, remask = pending, torch.zeros_like(pending)
            done = _write(row, transfer, stats).transfer
            history.end(done, stats)
            step_map[b][done[0]] = call
            entropies[b][done[0]] = stats.entropy[0, done[0]].float()
            row[remask] = mask_id
            step_map[b][remask[0]] = -1
            entropies[b][remask[0]] = 0.0
            changed = done | remask
            call, step = call + 1, step + 1
            masks = (row[0] == mask_id).nonzero()[:, 0].tolist()
            if not (ends or done.any()) and in_block.any() and step >= history.steps:
                raise RuntimeError(f"model: no finite logits at step {call - 1} of row {b}")
            if ends:
                break
            if masks and sliding:
                start = masks[0]
            elif step >= history.steps and not (row == mask_id)[0, window].any():
                step = 0
                start += 0 if not masks else (masks[0] - start) // block_length * block_length
        calls = max(calls, call)
    return GenerateResult(tokens, step_map, calls, entropies)

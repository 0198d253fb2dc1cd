"""One step of decoding: statistics, choice and write; public in :mod:`torch_winnow.unmasking`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._unmasking.arguments import integer
from torch_winnow._unmasking.logit_stats import (
    LogitStats,
    as_stats,
    check_tensor,
    empty_statistics,
    id_tensor,
    logit_operands,
)
from torch_winnow._unmasking.results import StepResult
from torch_winnow._unmasking.rules import Rule, _plan, check_rule

_unmask_step = torch.ops.winnow.unmask_step_

# Numbered as in csrc/unmasking/step_arguments.h. In a random order only a NaN matters.
_SCORES = {"entropy": 0, "confidence": 1, "margin": 2, "random": 0}


def in_window(window: Tensor, length: int) -> Tensor:
    position = torch.arange(length, device=window.device)
    return (position >= window[:, :1]) & (position < window[:, 1:])


def score_of(stats: LogitStats, rule: Rule) -> Tensor:
    match rule.score:
        case "entropy":
            return stats.entropy
        case "margin":
            return stats.margin
        case "confidence":
            # max_prob is exact where the two agree: e.g. one half, which a threshold may name.
            return torch.where(stats.token == stats.argmax, stats.max_prob, stats.log_prob.exp())
        case _:
            return stats.entropy  # the order is random; only a NaN matters


def check_tokens(tokens: Tensor) -> None:
    check_tensor("tokens", tokens)
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"tokens: expected (B, L) int64 or int32, got {tuple(tokens.shape)} {tokens.dtype}"
        )


def check_logits(logits: Tensor, tokens: Tensor) -> None:
    check_tensor("logits", logits)
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"logits: expected (B, L, V) with (B, L) = {tuple(tokens.shape)} as in tokens, "
            f"got {tuple(logits.shape)}"
        )


def with_mask_id(mask_id: int, suppress_ids: Any, logits: Tensor) -> Tensor | None:
    ids = id_tensor(suppress_ids, logits)
    if not 0 <= mask_id < logits.shape[-1]:
        return ids
    own = torch.full((1,), mask_id, dtype=torch.int64, device=logits.device)
    return own if ids is None else torch.cat([ids, own])


@torch.no_grad()
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
    """One step of decoding: chooses masked positions by a rule and writes their tokens in place.

    Args:
        tokens: ``(B, L)`` int64 or int32, changed in place where it equals ``mask_id``.
        logits: ``(B, L, V)``; only those of masked positions in the window are read.
        mask_id: the mask's token id. It is suppressed, so it is never written; it may lie outside
            the vocabulary.
        rule: one of the rule classes of this module.
        window: ``(B, 2)`` int64, [start, end) of the positions to choose from.
        step: which step of a :class:`TopK` schedule this is. It is not part of the key of the
            draws: give each step a seed of its own, or a ``generator``.
        logit_stats_options: as in :func:`logit_stats`. ``mask`` narrows the choice further;
            ``shift=True`` where the logits at a position predict the next one (Dream).

    Returns:
        :class:`StepResult`. Every row with a mask in its window gets at least one token, unless all
        its logits there are NaN: such positions are left alone.

    Raises:
        ValueError: for a wrong shape, dtype or option.

    Example:
        >>> import torch
        >>> from torch_winnow.unmasking import EntropyThreshold, unmask_step_
        >>> tokens = torch.tensor([[5, 9, 9]])
        >>> logits = torch.zeros(1, 3, 10)
        >>> logits[0, 1, 7] = 20.0
        >>> unmask_step_(tokens, logits, mask_id=9, rule=EntropyThreshold(0.2)).count, tokens
        (tensor([1]), tensor([[5, 7, 9]]))
    """
    check_tokens(tokens)
    check_logits(logits, tokens)
    check_rule(rule)
    mask = logit_stats_options.pop("mask", None)
    shift = logit_stats_options.pop("shift", False)
    vocab_start = logit_stats_options.pop("vocab_start", None)
    if vocab_start is not None:
        raise ValueError(
            f"vocab_start: expected None, as a step needs the whole vocabulary, got {vocab_start}; "
            "merge its parts first"
        )
    for name, value in (("mask", mask), ("window", window)):
        if value is not None:
            check_tensor(name, value)
    operands = logit_operands(logits, **logit_stats_options)
    transfer, count, *statistic = _unmask_step(
        tokens,
        logits.detach(),
        integer("mask_id", mask_id),
        mask,
        window,
        *operands,
        shift,
        _SCORES[rule.score],
        *_plan(rule, integer("step", step, 0)),
        order_seed(rule, operands.seed, tokens),
    )
    stats = as_stats(
        statistic, operands.target_ids is not None, operands.previous_logits is not None
    )
    return StepResult(transfer, count, stats)


@register_fake("unmask_step_")
def _(
    tokens: Tensor,
    logits: Tensor,
    mask_id: int,
    mask: Tensor | None,
    window: Tensor | None,
    temperature: float,
    suppress_ids: Tensor | None,
    target_ids: Tensor | None,
    previous_logits: Tensor | None,
    unconditional_logits: Tensor | None,
    cfg_scale: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: Tensor | None,
    raw: bool,
    shift: bool,
    score: int,
    order: int,
    criterion: int,
    threshold: float,
    limit: int,
    order_seed: Tensor | None,
) -> tuple[Tensor, ...]:
    check_same_device(tokens=tokens, logits=logits, mask=mask, window=window)
    check_same_device(tokens=tokens, suppress_ids=suppress_ids, target_ids=target_ids)
    check_same_device(tokens=tokens, previous_logits=previous_logits, seed=seed)
    check_same_device(tokens=tokens, unconditional_logits=unconditional_logits)
    check_same_device(tokens=tokens, order_seed=order_seed)
    transfer = torch.empty(tokens.shape, dtype=torch.bool, device=tokens.device)
    count = tokens.new_empty(tokens.shape[:1], dtype=torch.int64)
    statistics = empty_statistics(
        logits, tuple(tokens.shape), target_ids is not None, previous_logits is not None
    )
    return transfer, count, *statistics


def order_seed(rule: Rule, seed: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The key of a random order, which is needed even where tokens are the argmax."""
    if rule.score != "random" or seed is not None:
        return seed
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=tokens.device)

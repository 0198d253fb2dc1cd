"""One step of decoding: statistics, choice and write; public in :mod:`torch_winnow.unmasking`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_winnow._unmasking.arguments import integer
from torch_winnow._unmasking.logit_stats import LogitStats, id_tensor, logit_stats, seed_tensor
from torch_winnow._unmasking.results import StepResult
from torch_winnow._unmasking.rules import Rule, check_rule, select


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
    if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"tokens: expected (B, L) int64 or int32, got {tuple(tokens.shape)} {tokens.dtype}"
        )


def check_logits(logits: Tensor, tokens: Tensor) -> None:
    if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"logits: expected (B, L, V) with (B, L) = {tuple(tokens.shape)} as in tokens, "
            f"got {tuple(logits.shape)}"
        )


def narrowed(masked: Tensor, mask: Tensor | None, window: Tensor | None) -> Tensor:
    """The masked positions that the caller's ``mask`` and ``window`` leave to choose from."""
    if mask is not None:
        if mask.shape != masked.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask: expected {tuple(masked.shape)} bool as in tokens, got "
                f"{tuple(mask.shape)} {mask.dtype}"
            )
        masked = masked & mask
    if window is not None:
        if not isinstance(window, Tensor) or window.dtype != torch.int64:
            raise ValueError(f"window: expected an int64 tensor (B, 2), got {window!r}")
        if window.shape != (masked.shape[0], 2):
            raise ValueError(
                f"window: expected (B, 2) with B={masked.shape[0]}, got {tuple(window.shape)}"
            )
        masked = masked & in_window(window, masked.shape[1])
    return masked


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
        step: which step of a :class:`TopK` schedule this is.
        logit_stats_options: as in :func:`logit_stats`. ``mask`` narrows the choice further.

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
    mask_id = integer("mask_id", mask_id)
    masked = narrowed(tokens == mask_id, logit_stats_options.pop("mask", None), window)
    seed = seed_tensor(
        logit_stats_options.pop("seed", None), logit_stats_options.pop("generator", None)
    )
    suppressed = with_mask_id(mask_id, logit_stats_options.pop("suppress_ids", None), logits)
    stats = logit_stats(
        logits, mask=masked, suppress_ids=suppressed, seed=seed, **logit_stats_options
    )
    transfer, _ = select(
        score_of(stats, rule), masked, rule, step=step, seed=order_seed(rule, seed, tokens)
    )
    return write_tokens(tokens, transfer, stats)


def order_seed(rule: Rule, seed: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The key of a random order, which is needed even where tokens are the argmax."""
    if rule.score != "random" or seed is not None:
        return seed
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=tokens.device)


def write_tokens(tokens: Tensor, transfer: Tensor, stats: LogitStats) -> StepResult:
    transfer = transfer & (stats.token >= 0)
    tokens.copy_(torch.where(transfer, stats.token, tokens))
    return StepResult(transfer, transfer.sum(1), stats)

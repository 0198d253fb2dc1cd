"""Which positions a rule unmasks: the definition of :func:`select_positions`, row by row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_winnow._unmasking.rules import (
    ConfidenceFactor,
    ConfidenceThreshold,
    EntropyBound,
    EntropyThreshold,
    PrefixThreshold,
    Rule,
    TopK,
)


def _prefix(scores: list[float], rule: Rule, step: int, dtype: torch.dtype) -> int:
    """How many of the scores, in the rule's order, it takes, compared in the scores' dtype."""

    def rounded(x: float) -> float:
        return float(torch.tensor(x, dtype=dtype))

    sizes = range(1, len(scores) + 1)
    match rule:
        case EntropyThreshold():
            hits = [score < rounded(rule.threshold) for score in scores]
            limit = len(scores) if rule.max_tokens is None else rule.max_tokens
            return min([*hits, False].index(False), limit)
        case EntropyBound():
            bound = rounded(rule.gamma)
            return max(
                (n for n in sizes if rounded(math.fsum(scores[: n - 1])) <= bound), default=0
            )
        case ConfidenceThreshold():
            return [*(s >= rounded(rule.threshold) for s in scores), False].index(False)
        case ConfidenceFactor():
            factor = rounded(rule.factor)
            return max(
                (n for n in sizes if rounded((n + 1) * (1 - scores[n - 1])) < factor), default=0
            )
        case PrefixThreshold():
            threshold = rounded(rule.threshold)
            low = rule.score == "entropy"
            hits = [s < threshold if low else s >= threshold for s in scores]
            return [*hits, False].index(False)
        case TopK():
            schedule = rule.schedule()
            return max(1, schedule[min(step, len(schedule) - 1)])


def select_positions(
    score: Tensor, mask: Tensor, rule: Rule, *, window: Tensor | None = None, step: int = 0
) -> tuple[Tensor, Tensor]:
    """See :func:`torch_winnow.unmasking.select_positions`."""
    return select(score, mask, rule, window, step, at_least=1)


def select(
    score: Tensor, mask: Tensor, rule: Rule, window: Tensor | None, step: int, at_least: int
) -> tuple[Tensor, Tensor]:
    transfer = torch.zeros_like(mask)
    left_to_right = isinstance(rule, PrefixThreshold) or (
        isinstance(rule, EntropyThreshold) and rule.order == "left_to_right"
    )
    sign = 1 if rule.score == "entropy" else -1
    dtype = torch.float64 if score.dtype == torch.float64 else torch.float32
    for b in range(score.shape[0]):
        start, end = (0, score.shape[1]) if window is None else window[b].tolist()
        start, end = max(start, 0), min(end, score.shape[1])
        positions = [i for i in range(start, end) if mask[b, i]]
        value = {i: float(score[b, i]) for i in positions}
        lost = [i for i in positions if math.isnan(value[i])]
        valid = [i for i in positions if not math.isnan(value[i])]
        if left_to_right:
            run = [value[i] for i in positions]
        else:
            valid.sort(key=lambda i: sign * value[i])
            run = [value[i] for i in valid]
        count = _prefix(run, rule, step, dtype)
        least = min(at_least, len(positions))
        chosen = (
            positions[:count]
            if left_to_right and count >= least
            else (valid + lost)[: max(count, least)]
        )
        transfer[b, chosen] = True
    return transfer, transfer.sum(1)

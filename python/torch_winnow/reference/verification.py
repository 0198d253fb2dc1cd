"""Definition of :func:`torch_winnow.unmasking.speculative_verify`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_winnow._unmasking.verification import Verification

__all__ = ["speculative_verify"]


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What to draw from once a draft from q was rejected; not normalised."""
    left = (p - q).clamp(min=0)
    return left if bool((left > 0).any()) else p


def accepts(p: Tensor, q: Tensor, token: int, uniform: float) -> bool:
    """Whether a draft drawn from q is accepted: uniform < p / q, for a uniform in (0, 1)."""
    return uniform * float(q[token]) < float(p[token])


def invert(weights: Tensor, uniform: float) -> int:
    """The index at which the cumulated weights exceed ``uniform`` times their sum."""
    cumulated = weights.cumsum(0)
    above = (cumulated > uniform * cumulated[-1]) & (weights > 0)
    if bool(above.any()):
        return int(above.nonzero()[0])
    return int((weights > 0).nonzero()[-1])


def speculative_verify(
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    *,
    temperature: float = 1.0,
    lengths: Tensor | None = None,
    order: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Verification:
    """See :func:`torch_winnow.unmasking.speculative_verify`: rows one by one.

    Draws follow the same distribution as the operator's, not the same numbers.
    """
    if seed is not None:
        generator = torch.Generator().manual_seed(int(seed))
    dtype = torch.float64 if target_logits.dtype == torch.float64 else torch.float32
    batch, rows = target_logits.shape[:2]
    if order is None:
        order = torch.arange(rows).expand(batch, rows)
        drafted = draft_tokens.shape[1]
    else:
        drafted = order.shape[1]
    steps = order.shape[1]
    tokens = torch.full((batch, steps), -1)
    log_prob = torch.zeros(batch, steps, dtype=dtype)
    accepted = torch.zeros(batch, dtype=torch.int64)
    last = torch.full((batch,), -1)

    def proper(logits: Tensor) -> bool:
        largest = float(logits.max()) if logits.numel() else -math.inf
        return math.isfinite(largest) and not bool(logits.isnan().any())

    def uniform() -> float:
        return float(torch.rand((), dtype=torch.float64, generator=generator))

    for b in range(batch):
        length = drafted if lengths is None else int(lengths[b])
        for j in range(steps):
            place = int(order[b, j])
            if place < 0:
                break
            has_draft = j < length
            target = target_logits[b, place].to(dtype)
            usable = proper(target)
            if has_draft and draft_logits is not None and temperature > 0:
                usable = usable and proper(draft_logits[b, place].to(dtype))
            if not usable:
                log_prob[b, j] = math.nan
                break
            log_p = (target / (temperature or 1.0)).log_softmax(-1)
            p = log_p.exp()
            draft = int(draft_tokens[b, place]) if has_draft else -1
            if temperature == 0:
                token = int(target.argmax())
                taken = token == draft
            else:
                q = torch.zeros_like(p)
                if has_draft and draft_logits is not None:
                    q = (draft_logits[b, place].to(dtype) / temperature).softmax(-1)
                elif has_draft:
                    q[draft] = 1.0
                taken = has_draft and accepts(p, q, draft, uniform())
                token = draft if taken else invert(residual(p, q), uniform())
            tokens[b, j] = token
            log_prob[b, j] = log_p[token]
            if not taken:
                last[b] = token
                break
            accepted[b] += 1
    return Verification(accepted, last, tokens, log_prob)

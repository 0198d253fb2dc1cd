"""Definitions of tracing ancestors and of backward sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_winnow.reference.resampling_weights import normalised_weights


def trace_ancestors(ancestors: Tensor, indices: Tensor | None = None) -> Tensor:
    """From the last generation back, one parent at a time."""
    if indices is None:
        indices = torch.arange(ancestors.shape[-1]).expand(ancestors.shape[1:])
    lines = [indices]
    for parents in ancestors.flip(0):
        lines.append(parents.gather(-1, lines[-1]))
    return torch.stack(lines[::-1])


def backward_sample(
    log_weights: Tensor,
    log_transition: Callable[[Tensor, Tensor], Tensor],
    successors: Tensor | None = None,
    *,
    log_bound: float | None = None,
    max_tries: int = 16,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Every particle weighed for every successor, and one draw each; the law, not the draws."""
    particles = log_weights.shape[-1]
    if successors is None:
        successors = torch.arange(particles).expand(log_weights.shape)
    if seed is not None:
        generator = torch.Generator().manual_seed(int(seed))
    parents = torch.arange(particles).expand(*successors.shape, -1)
    log_moves = log_transition(parents, successors.unsqueeze(-1).expand_as(parents))
    if log_bound is not None:
        log_moves = log_moves.clamp(max=log_bound)
    shares = normalised_weights(log_weights.unsqueeze(-2) + log_moves)
    drawn = torch.multinomial(shares.flatten(0, -2), 1, generator=generator)
    return drawn.reshape(successors.shape)

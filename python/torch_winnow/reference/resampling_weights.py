"""Definitions of the statistics of weights and of tempering, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_winnow.reference.resampling import relative_weights, without_nan


def _as_statistics(x: Tensor, like: Tensor) -> Tensor:
    return x if like.dtype == torch.float64 else x.float()


def _shares(log_w: Tensor) -> Tensor:
    """Shares of the mass: infinite weights have all of it, NaN none; zeros where there is none."""
    log_w = without_nan(log_w.double())
    if log_w.shape[-1] == 0:
        return log_w
    w = relative_weights(log_w)
    top = log_w.amax(-1, keepdim=True)
    return torch.where(top == -torch.inf, 0.0, w / w.sum(-1, keepdim=True))


def normalised_weights(log_weights: Tensor) -> Tensor:
    """Shares of the mass."""
    return _as_statistics(_shares(log_weights), log_weights)


def weight_entropy(log_weights: Tensor) -> Tensor:
    """``-sum W log W``."""
    shares = _shares(log_weights)
    return _as_statistics(-torch.xlogy(shares, shares).sum(-1), log_weights)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """``log(sum w / K)``."""
    log_w = without_nan(log_weights.double())
    if log_w.shape[-1] == 0:
        return _as_statistics(log_w.sum(-1) - torch.inf, log_weights)
    total = log_w.logsumexp(-1) - torch.tensor(float(log_w.shape[-1])).double().log()
    return _as_statistics(total, log_weights)


def _step_size(log_weights: Tensor, log_increments: Tensor) -> float:
    """Conditional effective sample size of one population."""
    log_a = without_nan(log_weights.double())
    k = len(log_a)
    if k == 0 or log_a.max() == -torch.inf:
        return 0.0
    if log_a.max() == torch.inf:
        log_a = torch.where(log_a == torch.inf, 0.0, -torch.inf)
    has_weight = log_a > -torch.inf
    log_b = without_nan(log_increments.double())[has_weight]
    log_a = log_a[has_weight].log_softmax(0)
    if log_b.max() == -torch.inf:
        return 0.0
    if log_b.max() == torch.inf:
        log_b = torch.where(log_b == torch.inf, 0.0, -torch.inf)
    once, twice = (log_a + log_b).logsumexp(0), (log_a + 2 * log_b).logsumexp(0)
    return k * float((2 * once - twice).exp())


def conditional_effective_sample_size(log_weights: Tensor, log_increments: Tensor) -> Tensor:
    """``K (sum W w)^2 / sum W w^2``, population by population."""
    k = log_weights.shape[-1]
    population = log_weights.shape[:-1]
    rows = zip(
        log_weights.reshape(population.numel(), k),
        log_increments.reshape(population.numel(), k),
        strict=True,
    )
    sizes = torch.tensor([_step_size(a, b) for a, b in rows], dtype=torch.float64)
    return _as_statistics(sizes.reshape(population), log_weights)


def _next_one(log_l: Tensor, log_w: Tensor, beta: float, target: float, max_beta: float) -> float:
    log_l = without_nan(log_l.double())
    k = len(log_l)
    if beta >= max_beta:
        return beta

    def size(step: float) -> float:
        # 0 times infinity is no number; at any step the infinite ones stay what they are.
        return _step_size(log_w, torch.where(log_l.isinf(), log_l, step * log_l))

    # Just above no step at all: who is left there.
    left = size(1e-300)
    if left == 0.0:
        return max_beta
    wanted = target * k if left > target * k else target * left
    low, high = 0.0, max_beta - beta
    if size(high) >= wanted * (1 - 1e-12):
        return max_beta
    for _ in range(110):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) >= wanted else (low, middle)
    return beta + low


def next_temperature(
    log_likelihood: Tensor,
    beta: float | Tensor,
    target_ess: float,
    *,
    log_weights: Tensor | None = None,
    max_beta: float = 1.0,
) -> Tensor:
    """Bisection, population by population."""
    k = log_likelihood.shape[-1]
    population = log_likelihood.shape[:-1]
    carried = torch.zeros_like(log_likelihood) if log_weights is None else log_weights
    betas = torch.as_tensor(beta, dtype=torch.float64).expand(population).reshape(-1)
    rows = zip(
        log_likelihood.reshape(population.numel(), k),
        carried.reshape(population.numel(), k),
        betas.tolist(),
        strict=True,
    )
    found = [_next_one(log_l, w, b, target_ess, max_beta) for log_l, w, b in rows]
    wide = log_likelihood.dtype == torch.float64
    if isinstance(beta, Tensor):
        wide |= beta.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    return torch.tensor(found, dtype=torch.float64).reshape(population).to(dtype)

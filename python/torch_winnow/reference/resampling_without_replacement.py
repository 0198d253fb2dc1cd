"""Definitions of sampling without replacement, in float64, population by population."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_winnow._resampling.without_replacement import WithoutReplacement
from torch_winnow.reference.resampling import philox_bits
from torch_winnow.reference.resampling_weights import normalised_weights


def _uniforms(seed: int, row: int, count: int) -> Tensor:
    bits = [philox_bits(seed, row, element) >> 12 for element in range(count)]
    return (torch.tensor(bits, dtype=torch.float64) + 0.5) * 2.0**-52


def _log_tails(log_w: Tensor, k: int) -> Tensor:
    """Row i: logarithms of the elementary symmetric polynomials 0 to k of the weights from i on."""
    rows = [torch.tensor([0.0] + [-torch.inf] * k, dtype=torch.float64)]
    for x in log_w.flip(0):
        shifted = torch.cat([torch.tensor([-torch.inf], dtype=torch.float64), rows[-1][:-1] + x])
        rows.append(torch.logaddexp(rows[-1], shifted))
    return torch.stack(rows[::-1])


def _inclusion(log_w: Tensor, k: int) -> Tensor:
    """``w e_{k-1}(the others) / e_k``."""
    whole = _log_tails(log_w, k)[0, k]
    others = [_log_tails(torch.cat([log_w[:i], log_w[i + 1 :]]), k) for i in range(len(log_w))]
    return torch.stack([x + e[0, k - 1] - whole for x, e in zip(log_w, others, strict=True)]).exp()


def _targets(shares: Tensor, k: int) -> Tensor:
    """k times the share, certain where that reaches 1, the rest dealt out among the others."""
    certain = torch.zeros(len(shares), dtype=torch.bool)
    while True:
        rest = (k - certain.sum()) * shares / shares[~certain].sum()
        more = (rest >= 1) & ~certain
        if not more.any():
            return torch.where(certain, 1.0, rest)
        certain |= more


def _pareto(shares: Tensor, k: int, u: Tensor) -> tuple[Tensor, Tensor]:
    targets = _targets(shares, k)
    variance = (targets * (1 - targets)).sum().clamp(min=1.0)
    bend = targets * (1 - targets) * (targets - 0.5) / variance**2
    ranks = u / (1 - u) * (1 - targets) / targets * bend.exp()
    chosen = ranks.argsort()[:k].sort().values
    return chosen, targets[chosen]


def _gumbel_topk(shares: Tensor, k: int, u: Tensor) -> tuple[Tensor, Tensor]:
    perturbed = shares.log() - (-u.log()).log()
    order = perturbed.argsort(descending=True)
    if len(shares) <= k:
        return order, torch.ones(len(shares), dtype=torch.float64)
    threshold = perturbed[order[k]]
    chosen = order[:k]
    return chosen, -torch.expm1(-torch.exp(shares[chosen].log() - threshold))


def _conditional_poisson(shares: Tensor, k: int, u: Tensor) -> tuple[Tensor, Tensor]:
    log_w, missing, chosen = shares.log(), k, []
    tails = _log_tails(log_w, k)
    for i in range(len(shares)):
        taken = log_w[i] + tails[i + 1, missing - 1] - tails[i, missing]
        if missing > 0 and u[i] < taken.exp():
            chosen.append(i)
            missing -= 1
    return torch.tensor(chosen, dtype=torch.int64), _inclusion(log_w, k)[chosen]


_DESIGNS = {
    "gumbel_topk": _gumbel_topk,
    "conditional_poisson": _conditional_poisson,
    "pareto": _pareto,
}


def sample_without_replacement(
    log_weights: Tensor,
    k: int,
    *,
    design: str = "conditional_poisson",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> WithoutReplacement:
    """Population by population: those with weight, the design, Horvitz-Thompson weights."""
    if seed is None:
        seed = torch.empty((), dtype=torch.int64).random_(generator=generator)
    population = log_weights.shape[:-1]
    rows = log_weights.reshape(population.numel(), log_weights.shape[-1])
    indices = torch.full((len(rows), k), -1)
    inclusion = torch.zeros((len(rows), k), dtype=torch.float64)
    weights = torch.zeros((len(rows), k), dtype=torch.float64)
    for row, log_w in enumerate(rows):
        shares = normalised_weights(log_w.double())
        place = shares.nonzero().squeeze(-1)
        u = _uniforms(int(seed), row, len(log_w))[place]
        count = min(k, len(place))
        if count == 0:
            continue
        if len(place) > k or design == "gumbel_topk":
            chosen, probability = _DESIGNS[design](shares[place], k, u)
        else:
            chosen, probability = torch.arange(count), torch.ones(count, dtype=torch.float64)
        indices[row, :count] = place[chosen]
        inclusion[row, :count] = probability
        weights[row, :count] = shares[place[chosen]] / probability
    dtype = torch.float64 if log_weights.dtype == torch.float64 else torch.float32
    shape = (*population, k)
    return WithoutReplacement(
        indices.reshape(shape), inclusion.reshape(shape).to(dtype), weights.reshape(shape).to(dtype)
    )


def inclusion_probabilities(log_weights: Tensor, k: int) -> Tensor:
    """Of conditional Poisson sampling, by leaving out each particle in turn."""
    population = log_weights.shape[:-1]
    rows = log_weights.reshape(population.numel(), log_weights.shape[-1])
    result = torch.zeros(rows.shape, dtype=torch.float64)
    for row, log_w in enumerate(rows):
        shares = normalised_weights(log_w.double())
        place = shares.nonzero().squeeze(-1)
        some = k > 0 and len(place) > k
        result[row, place] = _inclusion(shares[place].log(), k) if some else float(k > 0)
    dtype = torch.float64 if log_weights.dtype == torch.float64 else torch.float32
    return result.reshape(log_weights.shape).to(dtype)

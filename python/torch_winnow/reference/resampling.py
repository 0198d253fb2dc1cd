"""Definitions of the resampling operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_winnow._resampling.gather import Tree
from torch_winnow._resampling.resample import Resampling, Status
from torch_winnow._resampling.steering import PotentialState


def _statistics(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """``(sum w)^2 / sum w^2``; NaN is no weight, infinite weights share the mass."""
    log_w = _statistics(log_weights).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if log_w.shape[-1] == 0:
        return log_w.sum(-1)
    top = log_w.amax(-1, keepdim=True)
    w = torch.where(log_w == top, 1.0, torch.exp(log_w - top).nan_to_num(nan=0.0))
    return torch.where(top.squeeze(-1) == -torch.inf, 0.0, w.sum(-1) ** 2 / (w * w).sum(-1))


def _philox_bits(seed: int, row: int, element: int) -> int:
    """Philox4x32-10 keyed by the seed, counting elements and rows: 64 bits."""
    low = 0xFFFFFFFF
    c = [element & low, element >> 32, row & low, row >> 32]
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & low, (p0 >> 32) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return (c[1] << 32) | c[0]


def _draws(seed: int, row: int, count: int) -> Tensor:
    bits = [_philox_bits(seed, row, element) >> 11 for element in range(count)]
    return torch.tensor(bits, dtype=torch.float64) * 2.0**-53


def normalised(log_w: Tensor) -> Tensor:
    """Shares of the mass, in float64, by the rules of :func:`effective_sample_size`."""
    log_w = log_w.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    top = log_w.amax(-1, keepdim=True)
    w = torch.where(log_w == top, 1.0, torch.exp(log_w - top).nan_to_num(nan=0.0))
    return w / w.sum(-1, keepdim=True)


def _inverse_cdf(weights: Tensor, points: Tensor) -> Tensor:
    """The first particle whose cumulative share exceeds the point: never one without weight."""
    cumulative = weights.cumsum(-1)
    index = torch.searchsorted(cumulative / cumulative[-1], points, right=True)
    last = int(weights.nonzero().max())  # rounding may leave a point at or above the last share
    return index.clamp(max=last)


class _Options(NamedTuple):
    scheme: str
    samples: int
    ess_threshold: float | None
    keep_slots: bool
    uniforms: Tensor | None
    seed: int
    row: int


def _choose(weights: Tensor, options: _Options) -> Tensor:
    """Ancestors of one population, ascending but for multinomial ones."""
    scheme, samples, uniforms = options.scheme, options.samples, options.uniforms
    seed, row = options.seed, options.row
    grid = torch.arange(samples, dtype=torch.float64)
    if scheme == "systematic":
        u = _draws(seed, row, 1) if uniforms is None else uniforms.double().reshape(1)
        return _inverse_cdf(weights, (grid + u) / samples)
    if scheme == "residual":
        share = samples * weights / weights.sum()
        whole = share.floor().long()
        drawn = samples - int(whole.sum())
        rest = share - whole
        index = torch.arange(len(weights)).repeat_interleave(whole)
        if drawn > 0:
            index = torch.cat([index, _inverse_cdf(rest, _draws(seed, row, drawn))])
        return index.sort().values
    u = _draws(seed, row, samples) if uniforms is None else uniforms.double()[:samples]
    return _inverse_cdf(weights, (grid + u) / samples if scheme == "stratified" else u)


def _keep_slots(offspring: Tensor) -> Tensor:
    survives = offspring > 0
    index = torch.arange(len(offspring))
    ancestors = index.clone()
    ancestors[~survives] = index.repeat_interleave((offspring - 1).clamp(min=0))
    return ancestors


def _resample_one(log_w: Tensor, options: _Options) -> Resampling:
    k, samples, threshold = len(log_w), options.samples, options.ess_threshold
    status = Status.OK
    if k == 0:
        status |= Status.NOTHING_LIVE
    if log_w.isnan().any():
        status |= Status.NAN
    log_w = log_w.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if k > 0 and log_w.max() == -torch.inf:
        status |= Status.NO_WEIGHT
    if k > 0 and log_w.max() == torch.inf:
        status |= Status.INFINITE
    ess = effective_sample_size(log_w)
    dead = bool(status & (Status.NOTHING_LIVE | Status.NO_WEIGHT))
    resampled = not dead and (threshold is None or bool(ess < threshold * k))
    log_z = torch.zeros((), dtype=torch.float64)
    if resampled:
        top = log_w.max()
        weights = torch.where(log_w == top, 1.0, torch.exp(log_w - top).nan_to_num(nan=0.0))
        log_z = weights.mean().log() + top
        ancestors = _choose(weights, options)
        new_log_w = torch.zeros(samples, dtype=torch.float64)
    else:
        ancestors = torch.arange(samples) % max(k, 1)
        new_log_w = log_w[ancestors]
    offspring = torch.bincount(ancestors, minlength=k)
    if options.keep_slots:
        ancestors = _keep_slots(offspring)
    return Resampling(
        ancestors,
        offspring,
        new_log_w,
        log_z,
        ess,
        torch.tensor(resampled),
        torch.tensor(int(status), dtype=torch.int32),
    )


def _resample_masked(log_w: Tensor, mask: Tensor, options: _Options) -> Resampling:
    """The live particles are a population of their own; the others keep slot and are lowered."""
    slot = mask.nonzero().squeeze(-1)
    live = _resample_one(log_w[slot], options._replace(samples=len(slot)))
    ancestors = torch.arange(len(log_w))
    ancestors[slot] = slot[live.ancestors]
    lowered = log_w.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) - live.log_z
    new_log_w = lowered.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    new_log_w[slot] = live.log_weights
    offspring = torch.bincount(ancestors, minlength=len(log_w))
    return live._replace(ancestors=ancestors, offspring=offspring, log_weights=new_log_w)


def resample(
    log_weights: Tensor,
    *,
    scheme: str = "systematic",
    num_samples: int | None = None,
    ess_threshold: float | None = None,
    keep_slots: bool = False,
    mask: Tensor | None = None,
    uniforms: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Resampling:
    """Population by population in float64: shares, inverse distribution function, counts."""
    if seed is None:
        seed = torch.empty((), dtype=torch.int64).random_(generator=generator)
    k = log_weights.shape[-1]
    samples = k if num_samples is None else num_samples
    population = log_weights.shape[:-1]
    rows = log_weights.double().reshape(population.numel(), k)
    results = []
    for row, log_w in enumerate(rows):
        u = None if uniforms is None else uniforms.reshape(len(rows), -1)[row]
        options = _Options(scheme, samples, ess_threshold, keep_slots, u, int(seed), row)
        if mask is None:
            results.append(_resample_one(log_w, options))
        else:
            results.append(_resample_masked(log_w, mask.reshape(rows.shape)[row], options))
    dtype = _statistics(log_weights).dtype

    def stack(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not results:
            return torch.empty(shape, dtype=dtype)
        return torch.stack([getattr(r, name) for r in results]).reshape(shape).to(dtype)

    return Resampling(
        stack("ancestors", (*population, samples), torch.int64),
        stack("offspring", (*population, k), torch.int64),
        stack("log_weights", (*population, samples), dtype),
        stack("log_z", population, dtype),
        stack("ess", population, dtype),
        stack("resampled", population, torch.bool),
        stack("status", population, torch.int32),
    )


def gather_particles(tree: Tree, ancestors: Tensor, dim: int | None = None) -> Tree:
    """Slot j of each population takes the row of particle ``ancestors[j]``."""

    def gather(leaf: Tensor) -> Tensor:
        at = (ancestors.dim() - 1 if dim is None else dim) % leaf.dim()
        # Population dimensions first, then the particle dimension, then everything else.
        lead = range(at - ancestors.dim() + 1, at + 1)
        rows = leaf.movedim(tuple(lead), tuple(range(ancestors.dim())))
        index = torch.meshgrid(*[torch.arange(n) for n in ancestors.shape], indexing="ij")
        taken = rows[(*index[:-1], ancestors)]
        return taken.movedim(tuple(range(ancestors.dim())), tuple(lead))

    return tree_map_only(Tensor, gather, tree)  # type: ignore[no-any-return]


def gather_particles_(tree: Tree, ancestors: Tensor, dim: int | None = None) -> Tree:
    """:func:`gather_particles`, written back."""
    tree_map_only(Tensor, lambda leaf: leaf.copy_(gather_particles(leaf, ancestors, dim)), tree)
    return tree


def fk_potential(
    reward: Tensor,
    state: PotentialState | None,
    *,
    kind: str,
    lmbda: float,
    terminal: bool = False,
) -> tuple[Tensor, PotentialState]:
    """Particle by particle in Python numbers: the paper's potentials, in logarithms."""
    r = _statistics(reward).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    past = torch.zeros_like(r) if state is None else state.log_product
    log_potential, statistic = torch.empty_like(r), torch.empty_like(r)
    for at in range(r.numel()):
        now, product = r.view(-1)[at].item(), past.view(-1)[at].item()
        before = None if state is None else state.reward.view(-1)[at].item()
        if kind == "difference":
            value, potential = now, lmbda * (now - (before or 0.0)) if lmbda else 0.0
        elif kind == "max":
            value = now if before is None else max(before, now)
            potential = lmbda * value if lmbda else 0.0
        else:
            value = now if before is None else before + now
            potential = lmbda * value if lmbda else 0.0
        if terminal and lmbda:
            potential = lmbda * now - product
        if product in (torch.inf, -torch.inf):  # cannot be divided out any more
            potential = 0.0
        if now == -torch.inf:  # a broken constraint ends the particle, whatever came before
            potential = now
        log_potential.view(-1)[at], statistic.view(-1)[at] = potential, value
    bounds = {"nan": -torch.inf, "posinf": torch.inf, "neginf": -torch.inf}
    product_ = (past + log_potential).nan_to_num(**bounds)
    return log_potential, PotentialState(statistic.nan_to_num(**bounds), product_)

"""Definitions of the resampling operators."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_winnow._resampling.gather import Tree
from torch_winnow._resampling.resample import Resampling, Status


def statistics(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def without_nan(log_w: Tensor) -> Tensor:
    """NaN is no weight."""
    return log_w.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def relative_weights(log_w: Tensor) -> Tensor:
    """Weights over the largest; infinite ones share the mass."""
    top = log_w.amax(-1, keepdim=True)
    return torch.where(log_w == top, 1.0, torch.exp(log_w - top).nan_to_num(nan=0.0))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """``(sum w)^2 / sum w^2``; NaN is no weight, infinite weights share the mass."""
    log_w = without_nan(statistics(log_weights))
    if log_w.shape[-1] == 0:
        return log_w.sum(-1)
    w = relative_weights(log_w)
    return torch.where(log_w.amax(-1) == -torch.inf, 0.0, w.sum(-1) ** 2 / (w * w).sum(-1))


def philox_bits(seed: int, row: int, element: int) -> int:
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
    bits = [philox_bits(seed, row, element) >> 11 for element in range(count)]
    return torch.tensor(bits, dtype=torch.float64) * 2.0**-53


def normalised(log_w: Tensor) -> Tensor:
    """Shares of the mass, in float64, by the rules of :func:`effective_sample_size`."""
    w = relative_weights(without_nan(log_w.double()))
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
    pinned: int | None
    seed: int
    row: int

    def uniform(self, element: int) -> float:
        return (philox_bits(self.seed, self.row, element) >> 11) * 2.0**-53

    def uniform_numbers(self, count: int) -> Tensor:
        if self.uniforms is not None:
            return self.uniforms.double().reshape(-1)[:count]
        return _draws(self.seed, self.row, count)


def _fixed_point(weights: Tensor) -> list[int]:
    """Weights as integers whose total is below 2^60: what is left over or equal is so exactly."""
    _, exponent = math.frexp(float(weights.sum()))
    return [int(w * 2.0 ** (60 - exponent)) for w in weights.tolist()]


_POINT, _COPY = 2**63 - 1, 2**63 - 2  # elements of the uniforms that a pinned particle needs


def _pinned_point(weights: Tensor, samples: int, options: _Options) -> Tensor:
    """Uniform over what the pinned particle holds of [0, samples)."""
    share = samples * weights / weights.sum()
    return share[: options.pinned].sum() + options.uniform(_POINT) * share[options.pinned]


def _systematic(weights: Tensor, samples: int, options: _Options) -> Tensor:
    u, point = options.uniform_numbers(1), None
    if options.pinned is not None:  # the grid has a point there
        point = _pinned_point(weights, samples, options)
        u = point.frac().reshape(1)
    points = (torch.arange(samples, dtype=torch.float64) + u) / samples
    return _at_points(weights, points, point, options)


def _stratified(weights: Tensor, options: _Options) -> Tensor:
    u, point = options.uniform_numbers(options.samples), None
    if options.pinned is not None:  # and so has its stratum
        point = _pinned_point(weights, options.samples, options)
        u[min(int(point), options.samples - 1)] = point.frac()
    grid = torch.arange(options.samples, dtype=torch.float64)
    return _at_points(weights, (grid + u) / options.samples, point, options)


def _at_points(
    weights: Tensor, points: Tensor, pinned_point: Tensor | None, options: _Options
) -> Tensor:
    """Who holds each point; rounding may give that of a very light pinned particle to another."""
    ancestors = _inverse_cdf(weights, points)
    if options.pinned is not None and pinned_point is not None:
        ancestors[min(int(pinned_point), len(points) - 1)] = options.pinned
    return ancestors


def _gains_remainder(weights: Tensor, options: _Options) -> bool:
    """Whether a copy of the pinned particle, any of them, is due to its remainder."""
    share = float((options.samples * weights / weights.sum())[options.pinned])
    return options.uniform(_POINT) * share >= math.floor(share)


def _residual(weights: Tensor, options: _Options) -> Tensor:
    fixed = _fixed_point(weights)
    total = sum(fixed)
    whole = [options.samples * q // total for q in fixed]
    rest = torch.tensor([options.samples * q % total for q in fixed], dtype=torch.float64)
    drawn = options.samples - sum(whole)
    index = torch.arange(len(weights)).repeat_interleave(torch.tensor(whole))
    if options.pinned is not None and _gains_remainder(weights, options):
        index = torch.cat([index, torch.tensor([options.pinned])])
        drawn -= 1
    if drawn > 0:
        index = torch.cat([index, _inverse_cdf(rest, options.uniform_numbers(drawn))])
    return index.sort().values


def _ssp(weights: Tensor, options: _Options) -> Tensor:
    """Srinivasan sampling process over runs of 64, then over runs of what they leave, and so on."""
    fixed = _fixed_point(weights)
    total = sum(fixed)
    offspring = [options.samples * q // total for q in fixed]
    certain = None
    if options.pinned is not None and _gains_remainder(weights, options):
        certain = options.pinned

    def pair(live: tuple[int, int], other: tuple[int, int], u: float) -> tuple[int, int]:
        """Of two particles with remainders: the one that is left, with its remainder."""
        (i, x), (j, y) = live, other
        if certain == j:
            (i, x), (j, y) = (j, y), (i, x)
        if x + y < total:  # one takes both
            first = certain == i or u * (x + y) < x
            return (i if first else j), x + y
        first = u * (2 * total - x - y) < total - y  # one is completed
        if certain == i:
            first = u * x * (2 * total - x - y) < total * (total - y)
        offspring[i if first else j] += 1
        return (j if first else i), x + y - total

    left = [(k, options.samples * q % total) for k, q in enumerate(fixed)]
    size = 1
    while len(left) > 1:
        runs = [
            functools.reduce(
                lambda live, e: pair(live, left[e], options.uniform(e * size)),  # noqa: B023
                range(first + 1, min(first + 64, len(left))),
                left[first],
            )
            for first in range(0, len(left), 64)
        ]
        left, size = runs, size * 64
    return torch.arange(len(weights)).repeat_interleave(torch.tensor(offspring))


def _killing(weights: Tensor, options: _Options) -> Tensor:
    """Particle k stays with probability ``w_k / max w``, and is replaced by a draw otherwise."""
    k = len(weights)
    stays = options.uniform_numbers(k) < weights / weights.max()
    drawn = torch.tensor([options.uniform(k + slot) for slot in range(k)], dtype=torch.float64)
    ancestors = torch.where(stays, torch.arange(k), _inverse_cdf(weights, drawn))
    if options.pinned is not None:  # it stays, or some slot is replaced by it
        killed = (1 - weights / weights.max()).cumsum(0)
        point = options.uniform(_POINT) * k - float(weights.sum() / weights.max())
        slot = options.pinned if point < 0 else int(torch.searchsorted(killed, point, right=True))
        ancestors[slot] = ancestors[options.pinned]
        ancestors[options.pinned] = options.pinned
    return ancestors


def _optimal(weights: Tensor, log_shares: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """Ancestors and log weights, whose mean is 1; a pinned particle has more weight than share."""
    samples = options.samples
    fixed = torch.tensor(_fixed_point(weights))
    kept = fixed > 0
    if int(kept.sum()) <= samples:
        index = kept.nonzero().squeeze(-1)
        copies = torch.bincount(torch.arange(samples) % len(index), minlength=len(index))
        log_weights = log_shares[index] + (samples / copies).log()
        return index.repeat_interleave(copies), log_weights.repeat_interleave(copies)
    kept = torch.zeros_like(kept)
    drawn, total = samples, int(fixed.sum())
    while drawn > 0 and not torch.equal(kept, fixed >= -(-total // drawn)):
        kept = fixed >= -(-total // drawn)
        drawn, total = samples - int(kept.sum()), int(fixed[~kept].sum())
    others = torch.where(kept, 0, fixed).double()
    if options.pinned is not None and kept[options.pinned]:
        options = options._replace(pinned=None)
    ancestors = torch.cat([kept.nonzero().squeeze(-1), _systematic(others, drawn, options)])
    level = total / max(drawn, 1) / float(fixed.sum())
    log_level = math.log(level) if drawn > 0 else 0.0
    log_weights = torch.where(kept, log_shares, log_level) + math.log(max(samples, 1))
    ancestors = ancestors.sort().values
    return ancestors, log_weights[ancestors]


def _choose(weights: Tensor, log_shares: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """Ancestors of one population, ascending but for multinomial and killing, and log weights."""
    scheme = options.scheme
    log_weights = torch.zeros(options.samples, dtype=torch.float64)
    if scheme == "multinomial":
        ancestors = _inverse_cdf(weights, options.uniform_numbers(options.samples))
        if options.pinned is not None:
            ancestors[options.pinned] = options.pinned
        return ancestors, log_weights
    if scheme == "killing":
        return _killing(weights, options), log_weights
    if scheme == "optimal":
        ancestors, log_weights = _optimal(weights, log_shares, options)
    elif scheme == "systematic":
        ancestors = _systematic(weights, options.samples, options)
    else:
        choose = {"stratified": _stratified, "residual": _residual, "ssp": _ssp}
        ancestors = choose[scheme](weights, options)
    if options.pinned is not None:  # any of its copies comes to lie in its slot
        copies = (ancestors == options.pinned).nonzero().squeeze(-1)
        copy = int(copies[int(options.uniform(_COPY) * len(copies))])
        ancestors = ancestors.roll(options.pinned - copy)
        log_weights = log_weights.roll(options.pinned - copy)
    return ancestors, log_weights


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
    log_w = without_nan(log_w)
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
        weights = relative_weights(log_w)
        log_z = weights.mean().log() + top
        log_shares = torch.where(log_w == top, 0.0, log_w - top) - weights.sum().log()
        if options.pinned is not None:  # it survives without weight too
            least = 2.0 ** (math.frexp(float(weights.sum()))[1] - 60)
            weights[options.pinned] = max(float(weights[options.pinned]), least)
        ancestors, new_log_w = _choose(weights, log_shares, options)
    else:
        ancestors = torch.arange(samples) % max(k, 1)
        new_log_w = log_w[ancestors]
    offspring = torch.bincount(ancestors, minlength=k)
    if options.keep_slots:
        of_particle = torch.zeros(k, dtype=torch.float64).index_put((ancestors,), new_log_w)
        ancestors = _keep_slots(offspring)
        new_log_w = of_particle[ancestors]
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
    pinned = options.pinned
    if pinned is not None:
        pinned = int(mask[:pinned].sum()) if mask[pinned] else None
    live = _resample_one(log_w[slot], options._replace(samples=len(slot), pinned=pinned))
    ancestors = torch.arange(len(log_w))
    ancestors[slot] = slot[live.ancestors]
    lowered = without_nan(log_w) - live.log_z
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
    pinned: int | Tensor | None = None,
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
        b = (
            None
            if pinned is None
            else int(torch.as_tensor(pinned).expand(population).flatten()[row])
        )
        options = _Options(scheme, samples, ess_threshold, keep_slots, u, b, int(seed), row)
        if mask is None:
            results.append(_resample_one(log_w, options))
        else:
            results.append(_resample_masked(log_w, mask.reshape(rows.shape)[row], options))
    dtype = statistics(log_weights).dtype

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

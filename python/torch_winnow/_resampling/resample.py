"""Resampling: from weights to ancestors."""

from __future__ import annotations

import enum
import operator
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._resampling import autograd
from torch_winnow._resampling.weights import detached_weights, require_tensor, statistics_dtype

_resample = torch.ops.winnow.resample

SCHEMES = ("systematic", "stratified", "residual", "ssp", "killing", "optimal", "multinomial")


class Status(enum.IntFlag):
    """Bits of :attr:`Resampling.status`.

    Attributes:
        OK: nothing to report.
        NO_WEIGHT: every live log weight is -inf or NaN. The population is not resampled.
        NAN: a live log weight is NaN; it counts as -inf.
        INFINITE: a live log weight is +inf; the infinite ones share the mass.
        NOTHING_LIVE: the mask is false everywhere, or there are no particles. Not resampled.
    """

    OK = 0
    NO_WEIGHT = 1
    NAN = 2
    INFINITE = 4
    NOTHING_LIVE = 8


class Resampling(NamedTuple):
    """What :func:`resample` decides for each population.

    Attributes:
        ancestors: ``(..., M)`` int64. Slot j of the new population takes particle ``ancestors[j]``.
        offspring: ``(..., K)`` int64. How often each particle was chosen; sums to M.
        log_weights: ``(..., M)`` weights that the new population carries: zero after a resample,
            of mean one (in exponentials) after an ``"optimal"`` one.
        log_z: ``(...)`` log of the mean weight that a resample divided out, 0 where there was none.
            Summed over the steps, plus the log mean of the last weights, it is the logarithm of an
            unbiased estimate of the normalising constant.
        ess: ``(...)`` effective sample size of the weights that came in.
        resampled: ``(...)`` bool.
        status: ``(...)`` int32, bits of :class:`Status`.
    """

    ancestors: Tensor
    offspring: Tensor
    log_weights: Tensor
    log_z: Tensor
    ess: Tensor
    resampled: Tensor
    status: Tensor


def check_seed(
    seed: SupportsIndex | Tensor | None, generator: torch.Generator | None
) -> int | Tensor | None:
    """The seed as an int or a tensor, checked; None if it is to be drawn."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    if seed is None:
        return None
    if generator is not None:
        raise ValueError("seed: expected either a seed or a generator, got both")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise ValueError(
                f"seed: expected an int or a 0-dim int64 tensor, got {seed.dtype} of shape "
                f"{tuple(seed.shape)}"
            )
        return seed
    if not isinstance(seed, int):
        try:
            seed = operator.index(seed)
        except TypeError:
            raise ValueError(
                f"seed: expected an int or a 0-dim int64 tensor, got {type(seed).__name__}"
            ) from None
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a number of 64 bits with sign, got {seed}")
    return seed


def _pinned_particles(pinned: SupportsIndex | Tensor, log_weights: Tensor) -> Tensor:
    """One index per population."""
    population = log_weights.shape[:-1]
    if isinstance(pinned, Tensor):
        if pinned.dtype != torch.int64 or pinned.shape not in (population, ()):
            raise ValueError(
                f"pinned: expected int64 of shape {tuple(population)} or (), got {pinned.dtype} of "
                f"shape {tuple(pinned.shape)}"
            )
        return pinned.expand(population)
    try:
        index = operator.index(pinned)
    except TypeError:
        raise ValueError(
            f"pinned: expected an int or an int64 tensor, got {type(pinned).__name__}"
        ) from None
    return log_weights.new_full(population, index, dtype=torch.int64)


def resample(
    log_weights: Tensor,
    *,
    scheme: str = "systematic",
    num_samples: int | None = None,
    ess_threshold: float | None = None,
    keep_slots: bool = False,
    mask: Tensor | None = None,
    pinned: SupportsIndex | Tensor | None = None,
    uniforms: Tensor | None = None,
    seed: SupportsIndex | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Resampling:
    r"""Choose M ancestors among K weighted particles, so that each is chosen M times its share.

    With :math:`W_k = w_k / \sum w` every scheme is unbiased: :math:`E[\text{offspring}_k] = M W_k`.
    They differ in the noise around it (Douc, Cappé and Moulines 2005; Chopin and Papaspiliopoulos
    2020, chapter 9):

    - ``"systematic"``: one uniform for all; the least noise, and the default. Cumulative offspring
      differ from :math:`M \sum_{i \le k} W_i` by less than 1.
    - ``"stratified"``: one uniform per slot.
    - ``"ssp"``: the Srinivasan sampling process (Gerber, Chopin and Whiteley 2019). Like systematic
      it gives each particle :math:`M W_k` rounded up or down; unlike it, its variance vanishes
      whatever the order of the particles.
    - ``"residual"``: :math:`\lfloor M W_k \rfloor` each, the rest drawn in proportion to what the
      floor dropped.
    - ``"killing"``: particle k stays in its slot with probability :math:`w_k / \max w` and is
      replaced by an independent draw otherwise. Needs M = K.
    - ``"multinomial"``: independent draws; slot j takes the particle at its uniform j. The most
      noise.
    - ``"optimal"`` (Fearnhead and Clifford 2003): M distinct particles with weights of their own.
      Those above a threshold are kept, the others drawn and given the threshold as weight; no
      unbiased choice of M particles has less variance. For M < K, to cut down an enlarged
      population; unbiased as each copy counts by its weight. Where M particles or fewer have any
      weight, all are kept, in turns, and share their weight among their slots.

    Weights are cumulated in 63-bit integers: offspring always sum to M, a particle of weight zero
    is never chosen, and the result is bitwise the same for any number of threads and on any
    instruction set.

    Ancestors are a discrete decision and have no gradient. Where ``log_weights`` requires one,
    ``log_z`` has its own (the normalised weights of the live), and the new weights have that of
    their choice, log W[a] - stop(log W[a]) (Ścibior and Wood 2021): ``exp(log_z)`` times the new
    weights then has the gradient of an unbiased estimate, at the price of its noise. Detach
    ``log_weights`` of the result for the usual, biased gradient through ``log_z`` alone.

    Args:
        log_weights: ``(..., K)`` natural-log weights of any magnitude, not necessarily normalised;
            each leading index is an independent population. float32, bfloat16, float16 or float64.
            NaN counts as -inf; +inf shares the mass with other +inf.
        scheme: see above.
        num_samples: M, by default K.
        ess_threshold: a share in (0, 1]: a population is resampled only where its effective sample
            size is below ``ess_threshold * K``. Elsewhere ancestors are the identity, the weights
            are carried, and ``log_z`` is 0. By default every population is resampled.
        keep_slots: survivors keep their slot and their further offspring fill the freed slots
            (Murray, Lee and Jacob 2016), so that :func:`gather_particles_` moves the fewest rows.
            Otherwise ancestors ascend, but for ``"multinomial"`` and ``"killing"``. Needs M = K.
        mask: ``(..., K)`` bool, false for a finished or absent particle: it is neither copied nor
            overwritten. ESS, threshold and ``log_z`` are over the live ones; the weights of the
            others are lowered by ``log_z``, so that the whole stays properly weighted. Needs M = K.
        pinned: an int, or int64 of shape ``(...)`` or ``()``: the particle of each population that
            survives in its own slot, for conditional SMC (Andrieu, Doucet and Holenstein 2010). The
            others follow the scheme's law given that the pinned particle holds one of the slots,
            any with the same probability, as if it had been drawn for it (Chopin and Singh 2015).
            Where ancestors would ascend they are rotated, so that any copy of it is as likely to
            lie there; schemes that look at the order of the particles (systematic, stratified, ssp)
            need more than that with ``keep_slots``, see ``docs/resampling/schemes.md``. It survives
            without weight too. A finished one (``mask``) changes nothing.
            On the GPU an index outside of the population pins nothing.
        uniforms: float32 or float64 numbers in [0, 1) to use instead of drawing: ``(...)`` for
            systematic, ``(..., M)`` for stratified and multinomial. What lies outside is clamped to
            it, NaN to 0. With ``mask`` the live slots take the first ones. Not with ``pinned``.
        seed: anything that is an int of 64 bits, or a 0-dim int64 tensor. A population's draws
            depend on the seed and the linear index of the population alone.
        generator: where the seed is drawn from if none is given; by default torch's own.
            ``torch.compile`` cannot trace a generator: give an int or a tensor as ``seed`` there.

    Returns:
        A :class:`Resampling`.

    Raises:
        ValueError: wrong type, shape, dtype or option, or both ``seed`` and ``generator``; the text
            names the argument.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import resample
        >>> result = resample(torch.tensor([0.5, 0.25, 0.25, 0.0]).log(), seed=0)
        >>> result.ancestors
        tensor([0, 0, 1, 2])
        >>> result.log_z.exp()
        tensor(0.2500)
    """
    weights, log_weights = log_weights, detached_weights(log_weights)
    if mask is not None:
        require_tensor("mask", mask, "a bool tensor (..., K)")
    if uniforms is not None:
        require_tensor("uniforms", uniforms, "a float32 or float64 tensor")
        uniforms = uniforms.detach()
    key = check_seed(seed, generator)
    number, seed_tensor = 0, None
    if isinstance(key, Tensor):
        seed_tensor = key
    elif key is not None:
        number = key
    elif uniforms is None:
        device = log_weights.device
        seed_tensor = torch.randint(2**63 - 1, (), generator=generator, device=device)
    result = Resampling(
        *_resample(
            log_weights,
            scheme,
            num_samples,
            ess_threshold,
            keep_slots,
            mask,
            uniforms,
            None if pinned is None else _pinned_particles(pinned, log_weights),
            number,
            seed_tensor,
        )
    )
    return autograd.resampled(result, weights, mask) if autograd.wants_gradient(weights) else result


autograd.without_gradient("resample")


@register_fake("resample")
def _(
    log_weights: Tensor,
    scheme: str,
    num_samples: int | None,
    ess_threshold: float | None,
    keep_slots: bool,
    mask: Tensor | None,
    uniforms: Tensor | None,
    pinned: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
) -> tuple[Tensor, ...]:
    check_same_device(
        log_weights=log_weights, mask=mask, uniforms=uniforms, pinned=pinned, seed=seed_tensor
    )
    population = log_weights.shape[:-1]
    samples = log_weights.shape[-1] if num_samples is None else num_samples
    dtype = statistics_dtype(log_weights.dtype)
    return (
        log_weights.new_empty((*population, samples), dtype=torch.int64),
        log_weights.new_empty(log_weights.shape, dtype=torch.int64),
        log_weights.new_empty((*population, samples), dtype=dtype),
        log_weights.new_empty(population, dtype=dtype),
        log_weights.new_empty(population, dtype=dtype),
        log_weights.new_empty(population, dtype=torch.bool),
        log_weights.new_empty(population, dtype=torch.int32),
    )

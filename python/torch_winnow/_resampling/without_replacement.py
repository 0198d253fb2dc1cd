"""Sampling without replacement: k distinct particles and the weights that make up for it."""

from __future__ import annotations

from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._resampling import autograd
from torch_winnow._resampling.resample import check_seed
from torch_winnow._resampling.weights import detached_weights, statistics_dtype, whole_number

_sample_without_replacement = torch.ops.winnow.sample_without_replacement
_inclusion_probabilities = torch.ops.winnow.inclusion_probabilities


class WithoutReplacement(NamedTuple):
    """What :func:`sample_without_replacement` draws from each population.

    Attributes:
        indices: ``(..., k)`` int64, distinct; -1 where fewer than k particles have weight.
        inclusion_probabilities: ``(..., k)`` how likely each of them was to be in the sample; 0 at
            -1.
        weights: ``(..., k)`` Horvitz-Thompson weights: the particle's share of the mass, divided by
            its inclusion probability; 0 at -1. ``(weights * f[indices]).sum(-1)`` estimates the
            population's weighted mean of f.
    """

    indices: Tensor
    inclusion_probabilities: Tensor
    weights: Tensor


def sample_without_replacement(
    log_weights: Tensor,
    k: SupportsIndex,
    *,
    design: str = "conditional_poisson",
    seed: SupportsIndex | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> WithoutReplacement:
    r"""Draw k distinct particles, with inclusion probabilities and Horvitz-Thompson weights.

    Where particles are copies of a few outcomes, such as the continuations of a beam search, a
    second copy adds nothing: sample without replacement, and weigh what was drawn by its share over
    the probability :math:`\pi` of being drawn. The designs:

    - ``"conditional_poisson"`` (Hájek 1964; beam search: Meister, Amini, Vieira and Cotterell
      2021): a set has probability proportional to the product of its weights. :math:`\pi` is
      exact, by a dynamic programme in ``O(K k)`` time and ``O(K + sqrt(K) k)`` memory; the estimate
      is unbiased. Indices ascend. On the CPU only.
    - ``"gumbel_topk"`` (Kool, van Hoof and Welling 2019): one particle after another, each in
      proportion to its weight among those that are left. Indices are in the order of the draws.
      ``inclusion_probabilities`` are those given the (k+1)-th largest perturbed log weight, with
      which the estimate is unbiased; they differ from draw to draw. ``O(K)``.
    - ``"pareto"`` (Rosén 1997, with the ranking variables of Bondesson, Traat and Lundqvist 2006):
      :math:`\pi` is k times the share, 1 where that is more (the rest is dealt out again), **to an
      approximation** that gets better with :math:`\sum \pi (1 - \pi)`: within 0.003 for eight
      particles of unequal weight. ``O(K)``. Indices ascend.

    Args:
        log_weights: ``(..., K)`` natural-log weights of any magnitude; each leading index is an
            independent population. float32, bfloat16, float16 or float64, taken as numbers. NaN
            counts as -inf, and what has no weight is never drawn; infinite ones are all there is.
        k: 0 to K. Where fewer particles have weight, all of them are drawn and the rest is padded
            with index -1 and weight 0: an error would have to wait for the device.
        design: see above.
        seed: as in :func:`resample`: a draw depends on the seed, the linear index of the population
            and the particle's alone.
        generator: where the seed is drawn from if none is given; by default torch's own.

    Returns:
        A :class:`WithoutReplacement`, without gradients.

    Raises:
        ValueError: wrong type, shape, dtype or option; the text names the argument.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import sample_without_replacement
        >>> log_weights = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
        >>> sample = sample_without_replacement(log_weights, 3, seed=0)
        >>> sample.indices
        tensor([0, 1, 2])
        >>> sample.weights
        tensor([0.5000, 0.3000, 0.2000])
    """
    log_weights = detached_weights(log_weights)
    if not isinstance(design, str):
        raise ValueError(f"design: expected a name, got {type(design).__name__}")
    key = check_seed(seed, generator)
    if key is None:
        key = torch.randint(2**63 - 1, (), generator=generator, device=log_weights.device)
    number, seed_tensor = (0, key) if isinstance(key, Tensor) else (key, None)
    return WithoutReplacement(
        *_sample_without_replacement(log_weights, whole_number("k", k), design, number, seed_tensor)
    )


def inclusion_probabilities(log_weights: Tensor, k: SupportsIndex) -> Tensor:
    r"""How likely each particle is to be in a conditional Poisson sample of k.

    :math:`\pi_i = w_i e_{k-1}(w_{-i}) / e_k(w)` with elementary symmetric polynomials e, by a
    recursion of positive terms that neither cancels nor overflows.

    Args:
        log_weights: as in :func:`sample_without_replacement`.
        k: 0 to K.

    Returns:
        ``(..., K)`` float32 (float64 for float64 weights), without a gradient. They sum to k; where
        no more than k particles have weight, each of those has 1.

    Raises:
        ValueError: as :func:`sample_without_replacement`.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import inclusion_probabilities
        >>> inclusion_probabilities(torch.tensor([2.0, 1.0, 1.0]).log(), 2)
        tensor([0.8000, 0.6000, 0.6000])
    """
    log_weights = detached_weights(log_weights)
    return _inclusion_probabilities(log_weights, whole_number("k", k))  # type: ignore[no-any-return]


autograd.without_gradient("sample_without_replacement", "inclusion_probabilities")


@register_fake("sample_without_replacement")
def _(
    log_weights: Tensor, k: int, design: str, seed: int, seed_tensor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    check_same_device(log_weights=log_weights, seed=seed_tensor)
    shape = (*log_weights.shape[:-1], k)
    dtype = statistics_dtype(log_weights.dtype)
    return (
        log_weights.new_empty(shape, dtype=torch.int64),
        log_weights.new_empty(shape, dtype=dtype),
        log_weights.new_empty(shape, dtype=dtype),
    )


@register_fake("inclusion_probabilities")
def _(log_weights: Tensor, k: int) -> Tensor:
    return log_weights.new_empty(log_weights.shape, dtype=statistics_dtype(log_weights.dtype))

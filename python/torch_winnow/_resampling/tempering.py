"""Tempering: how far a population can move towards its target in one step."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._resampling import autograd
from torch_winnow._resampling.weights import is_number, require_tensor, statistics_dtype

_next_temperature = torch.ops.winnow.next_temperature


def next_temperature(
    log_likelihood: Tensor,
    beta: float | Tensor,
    target_ess: float,
    *,
    log_weights: Tensor | None = None,
    max_beta: float = 1.0,
) -> Tensor:
    r"""The largest temperature at which each population keeps its effective sample size.

    A tempered sampler moves through the distributions :math:`p_0(x) L(x)^\beta`. Going from
    ``beta`` to :math:`\beta'`, a particle's weight is multiplied by :math:`L^{\beta' - \beta}`, and
    the more so the fewer particles matter. The result is where the effective sample size of these
    factors has fallen to ``target_ess * K``, or ``max_beta`` exactly where it stays above (Jasra,
    Stephens, Doucet and Tsagaris 2011; Zhou, Johansen and Aston 2016). It decreases in
    ``target_ess``.

    It is found by a bracketed search to the rounding of the result, population by population, with
    every step inside one call; the size at the result is at least the target (but for rounding).
    The result exceeds ``beta`` wherever ``beta`` is below ``max_beta``, so that a loop ends.

    Args:
        log_likelihood: ``(..., K)`` natural logs, float32, bfloat16, float16 or float64; each
            leading index is an independent population. NaN counts as -inf. A particle at -inf is
            gone at any step: where the others are too few for the target, it is taken as a share of
            them. Those at +inf are all that is left at any step. Where all are -inf, or all equal,
            the result is ``max_beta``.
        beta: a number or float32 or float64 numbers that broadcast to ``(...)``.
        target_ess: a share in (0, 1]. With 1 every step is too far, unless all are equal.
        log_weights: ``(..., K)`` weights carried, of the likelihoods' dtype: then the size is the
            conditional one (:func:`conditional_effective_sample_size`).
        max_beta: where the schedule ends. A ``beta`` beyond it is returned as it is.

    Returns:
        ``(...)``, without a gradient: float64 where ``log_likelihood`` or ``beta`` is, else
        float32.

    Raises:
        ValueError: wrong type, shape, dtype or option; the text names the argument.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import effective_sample_size, next_temperature
        >>> log_likelihood = -0.5 * torch.linspace(-30, 30, 1000) ** 2
        >>> beta = next_temperature(log_likelihood, 0.0, 0.5)
        >>> effective_sample_size(beta * log_likelihood).round()
        tensor(500.)
    """
    require_tensor("log_likelihood", log_likelihood, "a floating tensor (..., K)")
    if log_weights is not None:
        require_tensor("log_weights", log_weights, "a floating tensor (..., K)")
        log_weights = log_weights.detach()
    for name, number in (("target_ess", target_ess), ("max_beta", max_beta)):
        if not is_number(number):
            raise ValueError(f"{name}: expected a number, got {type(number).__name__}")
    population = log_likelihood.shape[:-1]
    dtype = statistics_dtype(log_likelihood.dtype)
    if isinstance(beta, Tensor):
        if beta.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"beta: expected float32 or float64, got {beta.dtype}")
        try:
            beta = beta.detach().to(torch.promote_types(dtype, beta.dtype)).expand(population)
        except RuntimeError:
            raise ValueError(
                f"beta: expected a shape that broadcasts to {tuple(population)}, got "
                f"{tuple(beta.shape)}"
            ) from None
    elif is_number(beta):
        beta = log_likelihood.new_full(population, float(beta), dtype=dtype)
    else:
        raise ValueError(f"beta: expected a number or a tensor, got {type(beta).__name__}")
    return _next_temperature(  # type: ignore[no-any-return]
        log_likelihood.detach(), beta, float(target_ess), float(max_beta), log_weights
    )


autograd.without_gradient("next_temperature")


@register_fake("next_temperature")
def _(
    log_likelihood: Tensor,
    beta: Tensor,
    target_ess: float,
    max_beta: float,
    log_weights: Tensor | None,
) -> Tensor:
    check_same_device(log_likelihood=log_likelihood, beta=beta, log_weights=log_weights)
    return beta.new_empty(beta.shape)

"""Statistics of weights."""

from __future__ import annotations

import numbers
import operator
from typing import SupportsIndex

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._resampling import autograd

# Bound once: a look-up through torch.ops costs as much as a small op.
_effective_sample_size = torch.ops.winnow.effective_sample_size
_log_mean_exp = torch.ops.winnow.log_mean_exp
_weight_entropy = torch.ops.winnow.weight_entropy
_conditional_effective_sample_size = torch.ops.winnow.conditional_effective_sample_size


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results: float32, or float64 for float64 weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_tensor(argument: str, value: object, expected: str) -> None:
    """Refuses what is not a tensor by the name of the argument."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{argument}: expected {expected}, got {type(value).__name__}")


def is_number(value: object) -> bool:
    """Whether an option is a real number, NumPy's too; a tensor is not."""
    return isinstance(value, numbers.Real)


def whole_number(argument: str, value: SupportsIndex) -> int:
    """The int that a value stands for (NumPy's and tensors' too); refuses others by name."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{argument}: expected an int, got {type(value).__name__}") from None


def detached_weights(log_weights: Tensor) -> Tensor:
    """The weights as numbers: what is decided by them has no gradient."""
    require_tensor("log_weights", log_weights, "a floating tensor (..., K)")
    return log_weights.detach() if log_weights.requires_grad else log_weights


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Effective sample size of each population, ``(sum w)^2 / sum w^2``.

    Kong, Liu and Wong (1994). Between 1 (one particle holds all mass) and K (equal weights); 0
    where no particle has any weight. A NaN counts as no weight; infinite weights share the mass.

    Args:
        log_weights: ``(..., K)`` natural-log weights of any magnitude, not necessarily normalised;
            float32, bfloat16, float16 or float64.

    Returns:
        ``(...)`` float32 (float64 for float64 weights), differentiable where the weights are.

    Raises:
        ValueError: if ``log_weights`` is not a tensor, a scalar or not floating.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import effective_sample_size
        >>> effective_sample_size(torch.tensor([0.0, 0.0, -float("inf"), -float("inf")]))
        tensor(2.)
    """
    value: Tensor = _effective_sample_size(detached_weights(log_weights))
    if autograd.wants_gradient(log_weights):
        return autograd.effective_sample_size(value, log_weights)
    return value


def weight_entropy(log_weights: Tensor) -> Tensor:
    """Entropy of each population's normalised weights, ``-sum W log W``, in nats.

    Its exponential is another effective size, between 1 (one particle holds all mass) and K (equal
    weights). Arguments as in :func:`effective_sample_size`, and so are NaN and infinite weights.

    Returns:
        ``(...)`` float32 (float64 for float64 weights), differentiable where the weights are; 0
        where no particle has any weight.

    Raises:
        ValueError: as :func:`effective_sample_size`.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import weight_entropy
        >>> weight_entropy(torch.zeros(4)).exp()
        tensor(4.)
    """
    value: Tensor = _weight_entropy(detached_weights(log_weights))
    if autograd.wants_gradient(log_weights):
        return autograd.weight_entropy(value, log_weights)
    return value


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Logarithm of each population's mean weight: an estimate of a normalising constant.

    The same number as ``resample(log_weights).log_z``. A NaN counts as weight 0. Arguments as in
    :func:`effective_sample_size`.

    Returns:
        ``(...)`` float32 (float64 for float64 weights), differentiable where the weights are; -inf
        where no particle has any weight, or there are no particles, inf where one is infinite.

    Raises:
        ValueError: as :func:`effective_sample_size`.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import log_mean_exp
        >>> log_mean_exp(torch.tensor([1.0, 3.0]).log()).exp()
        tensor(2.)
    """
    value: Tensor = _log_mean_exp(detached_weights(log_weights))
    if autograd.wants_gradient(log_weights):
        return autograd.log_mean_exp(value, log_weights)
    return value


def normalised_weights(log_weights: Tensor) -> Tensor:
    """Each particle's share of its population's mass.

    NaN and infinite weights as in :func:`effective_sample_size`; all zeros where no particle has
    any weight, so the result never holds a NaN.

    Args:
        log_weights: as in :func:`effective_sample_size`.

    Returns:
        ``(..., K)`` float32 (float64 for float64 weights), differentiable where the weights are.

    Raises:
        ValueError: as :func:`effective_sample_size`.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import normalised_weights
        >>> normalised_weights(torch.tensor([0.0, -float("inf"), float("nan"), 0.0]))
        tensor([0.5000, 0.0000, 0.0000, 0.5000])
    """
    require_tensor("log_weights", log_weights, "a floating tensor (..., K)")
    if not log_weights.is_floating_point() or log_weights.dim() == 0:
        raise ValueError(
            f"log_weights: expected a floating tensor (..., K), got {log_weights.dtype} of shape "
            f"{tuple(log_weights.shape)}"
        )
    return autograd.Mass(log_weights).shares


def conditional_effective_sample_size(log_weights: Tensor, log_increments: Tensor) -> Tensor:
    """How many particles are left of a weighted population when new weights come on top.

    ``K (sum W w)^2 / sum W w^2`` with the normalised carried weights W and the increments w (Zhou,
    Johansen and Aston 2016, section 3.2). K where the increments are equal, however uneven the
    carried weights: it measures what this step does, where :func:`effective_sample_size` of the sum
    measures what all steps since the last resample did.

    Args:
        log_weights: ``(..., K)`` as in :func:`effective_sample_size`: the weights carried.
        log_increments: of the same shape and dtype. NaN counts as -inf; +inf among particles that
            have weight: the others' increments are 0 beside it.

    Returns:
        ``(...)`` float32 (float64 for float64 weights), 0 where nothing is left; differentiable
        where the arguments are.

    Raises:
        ValueError: not a tensor, a scalar, not floating, or shapes or dtypes that differ.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import conditional_effective_sample_size
        >>> carried = torch.tensor([0.7, 0.1, 0.1, 0.1]).log()
        >>> conditional_effective_sample_size(carried, torch.tensor([2.0, 2.0, 2.0, 2.0]).log())
        tensor(4.)
    """
    require_tensor("log_weights", log_weights, "a floating tensor (..., K)")
    require_tensor("log_increments", log_increments, "a floating tensor (..., K)")
    value: Tensor = _conditional_effective_sample_size(
        log_weights.detach(), log_increments.detach()
    )
    if autograd.wants_gradient(log_weights, log_increments):
        return autograd.conditional_effective_sample_size(value, log_weights, log_increments)
    return value


def _one_a_population(log_weights: Tensor) -> Tensor:
    return log_weights.new_empty(log_weights.shape[:-1], dtype=statistics_dtype(log_weights.dtype))


autograd.without_gradient(
    "effective_sample_size", "weight_entropy", "log_mean_exp", "conditional_effective_sample_size"
)
for _name in ("effective_sample_size", "weight_entropy", "log_mean_exp"):
    register_fake(_name)(_one_a_population)


@register_fake("conditional_effective_sample_size")
def _(log_weights: Tensor, log_increments: Tensor) -> Tensor:
    check_same_device(log_weights=log_weights, log_increments=log_increments)
    return _one_a_population(log_weights)

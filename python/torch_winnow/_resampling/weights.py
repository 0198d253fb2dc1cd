"""Statistics of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)

# Bound once: a look-up through torch.ops costs as much as a small op.
_effective_sample_size = torch.ops.winnow.effective_sample_size


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results: float32, or float64 for float64 weights."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_tensor(argument: str, value: object, expected: str) -> None:
    """Refuses what is not a tensor by the name of the argument."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{argument}: expected {expected}, got {type(value).__name__}")


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
            float32, bfloat16, float16 or float64. Taken as numbers: no gradient flows back.

    Returns:
        ``(...)`` float32 (float64 for float64 weights), without a gradient.

    Raises:
        ValueError: if ``log_weights`` is not a tensor, a scalar or not floating.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import effective_sample_size
        >>> effective_sample_size(torch.tensor([0.0, 0.0, -float("inf"), -float("inf")]))
        tensor(2.)
    """
    return _effective_sample_size(detached_weights(log_weights))  # type: ignore[no-any-return]


@torch.library.register_fake("winnow::effective_sample_size")
def _(log_weights: Tensor) -> Tensor:
    return log_weights.new_empty(log_weights.shape[:-1], dtype=statistics_dtype(log_weights.dtype))

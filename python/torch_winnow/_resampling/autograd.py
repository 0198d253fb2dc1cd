"""Gradients of what is differentiable in the weights.

Values are the kernels'; gradients those of the same expression in PyTorch, through
``value + (expression - expression.detach())``. So derivatives of any order are right, and a call
whose weights need no gradient never comes here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch_winnow._resampling.resample import Resampling

_implementations = torch.library.Library("winnow", "IMPL")  # type: ignore[no-untyped-call]


def without_gradient(*operators: str) -> None:
    """Operators that take weights as numbers: autograd passes them by, and their results are free.

    By default it would warn, and mark the whole numbers among the results as differentiable.
    """
    for operator in operators:
        _implementations.impl(  # type: ignore[no-untyped-call]
            operator, torch.library.fallthrough_kernel, "Autograd"
        )


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a result has to be differentiable in one of the tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def with_gradient_of(value: Tensor, expression: Tensor) -> Tensor:
    """The value, differentiable like the expression, which has to be finite."""
    return value + (expression - expression.detach()).to(value.dtype)


class Mass:
    """Weights relative to the largest: ``weights`` (..., K), their ``total`` (...) and ``shares``.

    NaN and -inf have no weight, infinite ones share the mass, and none of these has a gradient.
    Where there is no weight at all, shares are 0.
    """

    def __init__(self, log_weights: Tensor, live: Tensor | None = None) -> None:
        x = log_weights if log_weights.dtype == torch.float64 else log_weights.float()
        known = ~x.isnan() if live is None else ~x.isnan() & live
        infinite = (x == torch.inf) & known
        some_infinite = infinite.any(-1, keepdim=True)
        finite = x.isfinite() & known & ~some_infinite
        bounded = x.where(finite, 0.0)
        padded = torch.nn.functional.pad(
            bounded.detach().where(finite, -torch.inf), (0, 1), value=-torch.inf
        )
        top = padded.amax(-1, keepdim=True)
        self.top = top.where(top.isfinite(), 0.0)
        self.log_weights = (bounded - self.top).where(finite, 0.0)  # 0 where there is no weight
        self.weights = (self.log_weights.exp() * finite).where(~infinite, 1.0)
        self.total = self.weights.sum(-1)
        self.alive = self.total > 0
        self.log_total = self.total.where(self.alive, 1.0).log()
        self.shares = self.weights / self.total.where(self.alive, 1.0).unsqueeze(-1)

    def log_sum(self) -> Tensor:
        """Logarithm of the sum of weights, finite also where the sum is not."""
        return self.log_total + self.top.squeeze(-1)


def effective_sample_size(value: Tensor, log_weights: Tensor) -> Tensor:
    squares = Mass(log_weights).shares.square().sum(-1)
    return with_gradient_of(value, 1.0 / squares.where(squares > 0, 1.0))


def weight_entropy(value: Tensor, log_weights: Tensor) -> Tensor:
    mass = Mass(log_weights)
    return with_gradient_of(value, mass.log_total - (mass.shares * mass.log_weights).sum(-1))


def log_mean_exp(value: Tensor, log_weights: Tensor) -> Tensor:
    return with_gradient_of(value, Mass(log_weights).log_sum())


def conditional_effective_sample_size(
    value: Tensor, log_weights: Tensor, log_increments: Tensor
) -> Tensor:
    # log CESS = 2 log sum W w - log sum W - log sum W w^2 + log K, differentiated as a logarithm.
    counts = ~(log_weights + log_increments).isnan() & (log_increments > -torch.inf)
    once = Mass(log_weights + log_increments, counts).log_sum()
    twice = Mass(log_weights + 2 * log_increments, counts).log_sum()
    log_value = 2 * once - Mass(log_weights).log_sum() - twice
    scale = value.detach() * (log_value - log_value.detach()).exp()
    return with_gradient_of(value, scale)


def resampled(result: Resampling, log_weights: Tensor, mask: Tensor | None = None) -> Resampling:
    """Gradients of a resample: through ``log_z``, and through the choice of ancestors.

    After Ścibior and Wood (2021): a chosen particle's new weight carries the gradient of its own
    share, log W[a] - stop(log W[a]), so that exp(log_z) times the new weights has that of w[a].
    A weight that was carried has the gradient of the old one.
    """
    mass = Mass(log_weights, mask)
    x = log_weights if log_weights.dtype == torch.float64 else log_weights.float()
    live = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    log_z = torch.where(result.resampled, mass.log_sum(), 0.0)
    log_shares = mass.log_weights - mass.log_total.unsqueeze(-1)
    new = log_shares.take_along_dim(result.ancestors, -1)
    if new.shape == x.shape:  # with another number of slots nothing is carried
        carried = x.where(x.isfinite(), 0.0) - torch.where(live, 0.0, log_z.unsqueeze(-1))
        new = torch.where(result.resampled.unsqueeze(-1) & live, new, carried)
    return result._replace(
        log_weights=with_gradient_of(result.log_weights, new),
        log_z=with_gradient_of(result.log_z, log_z),
    )

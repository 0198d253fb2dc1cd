"""Definitions of the resampling operators."""

from __future__ import annotations

import torch
from torch import Tensor


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

"""Definition of :func:`torch_winnow.unmasking.soft_embedding`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_winnow._unmasking.soft_embedding import check_mask_embedding
from torch_winnow.reference.logit_stats import truncated

__all__ = ["soft_embedding"]


def soft_embedding(
    logits: Tensor,
    embedding: Tensor,
    *,
    mask_id: int | None = None,
    mask_embedding: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = 0.9,
    mix: float = 0.2,
) -> Tensor:
    """See :func:`torch_winnow.unmasking.soft_embedding`."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    base = check_mask_embedding(embedding, mask_id, mask_embedding).to(dtype)
    x = logits.to(dtype)
    vocab = x.shape[-1]
    if temperature == 0:
        temperature, top_k = 1.0, 1
    entropy = torch.special.entr((x / temperature).softmax(-1)).sum(-1)
    share = mix * (1 - entropy / math.log(vocab)) if vocab > 1 else mix * torch.ones_like(entropy)
    p = (truncated(x, temperature, top_k, top_p) / temperature).softmax(-1)
    soft = p @ embedding[:vocab].to(dtype)
    out = (1 - share)[..., None] * base + share[..., None] * soft
    lost = x.isnan().any(-1) | ~x.amax(-1).isfinite()
    out = out.masked_fill(lost[..., None], math.nan)
    if mask is not None:
        out = out.masked_fill(~mask[..., None], 0.0)
    return out.to(embedding.dtype)

"""Masked positions as mixtures of the mask's embedding and those of the tokens they may become."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._unmasking.arguments import integer
from torch_winnow._unmasking.logit_stats import check_tensor

_soft_embedding = torch.ops.winnow.soft_embedding


def check_mask_embedding(
    embedding: Tensor, mask_id: int | None, mask_embedding: Tensor | None
) -> Tensor:
    """The embedding of the mask, from whichever of the two was given."""
    if (mask_id is None) == (mask_embedding is None):
        got = "neither" if mask_id is None else "both"
        raise ValueError(f"mask_id: expected either mask_id or mask_embedding, got {got}")
    if mask_embedding is not None:
        return mask_embedding
    mask_id = integer("mask_id", mask_id)
    if embedding.dim() != 2:
        raise ValueError(f"embedding: expected (V, E), got {tuple(embedding.shape)}")
    if not 0 <= mask_id < embedding.shape[0]:
        raise ValueError(f"mask_id: expected one in [0, {embedding.shape[0]}), got {mask_id}")
    return embedding[mask_id]


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
    """Input embeddings of masked positions for latent refinement, from the last step's logits.

    Each row is (1 - a) e_mask + a times the sum of p(v) e_v over what top-k and top-p keep, with p
    renormalised to that, and a = ``mix`` (1 - H / log V), where H is the entropy of the whole
    distribution: unsure positions stay masks, sure ones approach their token. Latent Refinement
    Decoding, Zhu et al., arXiv 2510.11052, Eq. 3 and 4; the defaults are the paper's. Its stopping
    rule is the mean of :func:`logit_stats`' ``kl`` to the previous logits.

    The logits are read in their own dtype without a copy, sums are float32 (float64 for float64),
    top-p needs no sort, and of the embedding only the rows of kept tokens are read: without top-k
    and top-p that is all of it, and a matrix product is faster. Not differentiable.

    Args:
        logits: ``(..., V)`` float32, bfloat16, float16 or float64; strided rows are fine.
        embedding: ``(V, E)`` or with more rows than V; any of these dtypes, but float64 exactly
            where the logits are. The last dimension must be contiguous.
        mask_id: the mask's row of ``embedding``.
        mask_embedding: ``(E,)`` in the embedding's dtype, in its place.
        mask: ``(...)`` bool. Rows where it is false are never read and hold zeros.
        temperature: of the distribution, its entropy included. 0: the argmax alone is mixed in, by
            the entropy at temperature 1.
        top_k: keeps so many of the largest logits; ties are kept from the lowest id on.
        top_p: then keeps the smallest set of them whose mass is at least ``top_p`` of theirs.
        mix: the largest share of tokens in [0, 1]; 0.1 to 0.2 in the paper, where 1 collapses.

    Returns:
        ``(..., E)`` in the embedding's dtype. A row of logits with a NaN or +inf, or without any
        finite logit, gives NaN.

    Raises:
        ValueError: for a wrong shape, dtype or option.

    Example:
        >>> import torch
        >>> from torch_winnow.unmasking import soft_embedding
        >>> embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # the mask is the last
        >>> logits = torch.tensor([[9.0, 0.0, -9.0], [0.0, 0.0, 0.0], [0.0, 9.0, -9.0]])
        >>> soft_embedding(logits, embedding, mask_id=2, mix=0.5)
        tensor([[0.4994, 0.0000],
                [0.0000, 0.0000],
                [0.0000, 0.4994]])
    """
    check_tensor("logits", logits)
    check_tensor("embedding", embedding)
    for name, value in (("mask_embedding", mask_embedding), ("mask", mask)):
        if value is not None:
            check_tensor(name, value)
    return _soft_embedding(  # type: ignore[no-any-return]
        logits.detach(),
        embedding.detach(),
        check_mask_embedding(embedding, mask_id, mask_embedding).detach(),
        mask,
        temperature,
        None if top_k is None else integer("top_k", top_k),
        top_p,
        mix,
    )


@register_fake("soft_embedding")
def _(
    logits: Tensor,
    embedding: Tensor,
    mask_embedding: Tensor,
    mask: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    mix: float,
) -> Tensor:
    check_same_device(logits=logits, embedding=embedding, mask_embedding=mask_embedding, mask=mask)
    return embedding.new_empty((*logits.shape[:-1], embedding.shape[1]))

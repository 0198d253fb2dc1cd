"""Speculative verification: drafted tokens become an exact sample of the target model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._unmasking.logit_stats import seed_tensor

_speculative_verify = torch.ops.winnow.speculative_verify


class Verification(NamedTuple):
    """What :func:`speculative_verify` returns.

    Attributes:
        accepted: ``(B,)`` int64, how many drafts of the row were accepted.
        token: ``(B,)`` int64, the token that follows them: drawn from what the draft left of the
            target after a rejection, from the target itself after the last draft; -1 where there is
            no row of logits to draw from, or it holds no distribution.
        tokens: ``(B, S)`` int64, the tokens of the step in order of verification: the accepted
            drafts, then ``token``, then -1.
        log_prob: ``(B, S)``, their log-probabilities under the target in nats, then 0; NaN at the
            step whose logits hold no distribution. float32, float64 for float64 logits.
    """

    accepted: Tensor
    token: Tensor
    tokens: Tensor
    log_prob: Tensor


def _check(name: str, value: object, optional: bool = True) -> None:
    if not (isinstance(value, Tensor) or (optional and value is None)):
        raise ValueError(f"{name}: expected a tensor{' or None' * optional}, got {value!r}")


def speculative_verify(
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    *,
    temperature: float = 1.0,
    lengths: Tensor | None = None,
    order: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Verification:
    """Accepts a prefix of drafted tokens and draws the next one, distributed as the target's.

    A draft x ~ q is accepted with probability min(1, p(x) / q(x)); the first one rejected is
    replaced by a draw from max(p - q, 0), normalised, and what follows it is dropped. If none is
    rejected, a bonus token is drawn from the target's next row. Whatever the drafts are, the tokens
    of the step are distributed as the target would have drawn them one after another (Leviathan et
    al., arXiv 2211.17192; Chen et al., arXiv 2302.01318), up to the rounding of float32
    probabilities. Draws use 64-bit uniforms and are exact in the tail, as in :func:`logit_stats`.

    - *Chains* (a small draft model, prompt look-up): row t of ``target_logits`` is the target's
      prediction given the drafts before t, row T the one after all of them.
    - *Any order* (any-subset models, arXiv 2504.20456; self-speculative masked diffusion): logits
      and tokens lie by position of the sequence, and ``order`` lists the positions as the target
      conditions on them. ``draft_logits`` are the parallel predictions that the tokens were drawn
      from, ``target_logits`` those of one pass in which ``order[j]`` sees the positions before it
      in the order. Write ``tokens`` to those positions.
    - *Adaptive parallel decoding* (arXiv 2506.00413): the diffusion model's marginals are the
      draft, ``order`` runs from left to right, and the target is their mixture with a small
      autoregressive model, R log p_marginal + (1 - R) log p_autoregressive (normalised here). The
      paper keeps the drafts on which two samples with common noise agree; this keeps each at least
      as often.

    Rows are read once, in their own dtype, and only as far as drafts are accepted (on the CPU); the
    row that the token is drawn from once more. Not differentiable.

    Args:
        draft_tokens: ``(B, T)`` int64; only those that are verified need to be ids in ``[0, V)``.
        draft_logits: ``(B, T, V)``, the logits (or log-probabilities) that they were drawn from, in
            the target's dtype; None where they were not drawn but chosen: q is then certain.
        target_logits: ``(B, T + 1, V)``, or ``(B, T, V)`` where there is no bonus row. float32,
            bfloat16, float16 or float64. Suppress tokens with -inf.
        temperature: of both distributions; drafts drawn at another one need their logits scaled.
            0: a draft is accepted while it is the target's argmax, and the token is that argmax;
            log-probabilities are then those of temperature 1.
        lengths: ``(B,)`` int64, how many steps of each row have a draft; all by default.
        order: ``(B, S)`` int64 positions in ``[0, T)``, each once, and -1 from where a row ends;
            both logits are then by position. The position after the last draft (see ``lengths``)
            is the bonus token's.
        seed: key of the draws, an int or a 0-dim int64 tensor; they depend on it, the row and the
            step alone. Use a fresh one at every call.
        generator: to take such a seed from; without either, torch's default one.

    Returns:
        :class:`Verification`, with S = T (+ 1) steps without ``order``. A row of logits with a NaN
        or +inf, or without any finite logit, ends its row: token -1.

    Raises:
        ValueError: for a wrong shape, dtype or option, or an index out of range (on the CPU; on the
            GPU an id out of range is rejected, and other indices are clamped).

    Example:
        >>> import torch
        >>> from torch_winnow.unmasking import speculative_verify
        >>> p = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
        >>> result = speculative_verify(torch.tensor([[1, 2]]), None, p[None], temperature=0.0)
        >>> result.accepted, result.token, result.tokens
        (tensor([1]), tensor([0]), tensor([[ 1,  0, -1]]))
        >>> backwards = torch.tensor([[2, 1, 0]])
        >>> drafts = torch.tensor([[0, 0, 2]])
        >>> speculative_verify(drafts, None, p[None], order=backwards, temperature=0.0).tokens
        tensor([[2, 0, 1]])
    """
    _check("draft_tokens", draft_tokens, optional=False)
    _check("target_logits", target_logits, optional=False)
    for name, value in (("draft_logits", draft_logits), ("lengths", lengths), ("order", order)):
        _check(name, value)
    key = seed_tensor(seed, generator)
    if key is None and temperature != 0:
        key = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=target_logits.device)
    return Verification(
        *_speculative_verify(
            draft_tokens,
            None if draft_logits is None else draft_logits.detach(),
            target_logits.detach(),
            temperature,
            lengths,
            order,
            key,
        )
    )


@register_fake("speculative_verify")
def _(
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    target_logits: Tensor,
    temperature: float,
    lengths: Tensor | None,
    order: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_same_device(
        target_logits=target_logits,
        draft_tokens=draft_tokens,
        draft_logits=draft_logits,
        lengths=lengths,
        order=order,
        seed=seed if seed is not None and seed.device.type == "meta" else None,
    )
    rows = target_logits.shape[:1]
    steps = (*rows, target_logits.shape[1] if order is None else order.shape[1])
    dtype = torch.float64 if target_logits.dtype == torch.float64 else torch.float32
    return (
        target_logits.new_empty(rows, dtype=torch.int64),
        target_logits.new_empty(rows, dtype=torch.int64),
        target_logits.new_empty(steps, dtype=torch.int64),
        target_logits.new_empty(steps, dtype=dtype),
    )

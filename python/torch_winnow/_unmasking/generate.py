"""The loop around a model; public in :mod:`torch_winnow.unmasking`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from torch_winnow._unmasking.decoding import Decoding
from torch_winnow._unmasking.history_rules import DecodingRule
from torch_winnow._unmasking.results import AnswerEntropy, GenerateResult


@torch.no_grad()
def generate(
    model: Callable[..., Any],
    tokens: Tensor,
    *,
    mask_id: int,
    rule: DecodingRule,
    block_length: int | None = None,
    sliding: bool = False,
    steps: int | None = None,
    stop: AnswerEntropy | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    context: bool = False,
    progress: bool = False,
    **logit_stats_options: Any,
) -> GenerateResult:
    """Fills the masks of ``tokens`` by calling a masked diffusion model until none is left.

    Each row is decoded in blocks of ``block_length`` positions from its first mask on; it moves to
    its next block when the current one is complete, whatever the other rows do. Every step writes
    at least one token in every unfinished row, except under :class:`Remasking`, a random process in
    time. Where a step changed nothing the model is not called again. No gradients are recorded. For
    a loop of one's own, with a cache or a server around it: :class:`Decoding`.

    Args:
        model: maps tokens ``(B, L)`` to logits ``(B, L, V)``, or to an object whose ``logits`` they
            are.
        tokens: ``(B, L)`` int64 or int32 with ``mask_id`` where a token is wanted; left unchanged.
        mask_id: the mask's token id; never written.
        rule: one of the rule classes of this module.
        block_length: positions per block; None for one block.
        sliding: the block is not one of a grid, but the ``block_length`` positions from the first
            mask that is left (SDLM).
        steps: at most this many calls per block: a step writes at least ceil(masks left in the
            block / steps left) tokens of a row, best first. With ``TopK(1)`` this is LLaDA's
            schedule.
        stop: ends rows early, see :class:`AnswerEntropy`.
        seed, generator: key of the draws, as in :func:`logit_stats`; noise is fresh at every step.
        context: calls ``model(tokens, context)`` with a :class:`StepContext`: which rows and
            positions changed, each row's window, the time. It is then called at every step that
            reads logits.
        progress: shows a bar of the tokens written; needs tqdm.
        logit_stats_options: further options of :func:`logit_stats`. With ``cfg_scale`` the model is
            called on ``(2B, L)``: the tokens, then the same with everything that was given masked
            too, and the logits of the first are guided by those of the second, as LLaDA does.

    Returns:
        :class:`GenerateResult`.

    Raises:
        ValueError: for a wrong shape, dtype or option.
        RuntimeError: where all logits of a row's masked positions are NaN.

    Example:
        >>> import torch
        >>> from torch_winnow.unmasking import EntropyThreshold, generate
        >>> table = 20.0 * torch.eye(5)[:4]
        >>> def model(tokens):  # the token at position i is i
        ...     return table.expand(tokens.shape[0], 4, 5)
        >>> result = generate(
        ...     model, torch.full((1, 4), 4), mask_id=4, rule=EntropyThreshold(0.2), block_length=2
        ... )
        >>> result.tokens, result.calls
        (tensor([[0, 1, 2, 3]]), 2)
    """
    decoding = Decoding(
        tokens,
        mask_id=mask_id,
        rule=rule,
        block_length=block_length,
        sliding=sliding,
        steps=steps,
        stop=stop,
        seed=seed,
        generator=generator,
        **logit_stats_options,
    )
    guided = bool(logit_stats_options.get("cfg_scale"))
    if guided and context:
        raise ValueError(
            f"context: expected False with cfg_scale, which calls on another batch, got {context}"
        )
    given = tokens != mask_id
    logits = unconditional = None
    calls = 0
    status = decoding.status()
    with _bar(progress, status.masks) as bar:
        while status.unfinished:
            fresh = logits is None or status.needs_logits
            if fresh:
                logits, unconditional = _call(model, decoding, given if guided else None, context)
                calls += 1
            assert logits is not None
            decoding.advance(logits, unconditional, fresh=fresh)
            left, status = status.masks, decoding.status()
            if bar is not None:
                bar.update(left - status.masks)
    return decoding.result(calls)


def _call(
    model: Callable[..., Any], decoding: Decoding, given: Tensor | None, context: bool
) -> tuple[Tensor, Tensor | None]:
    """The model's logits, and those without what was ``given`` where they are to guide."""
    tokens = decoding.tokens.clone()  # a copy: what the model does to its input stays there
    if given is not None:
        tokens = torch.cat([tokens, tokens.masked_fill(given, decoding.mask_id)])
    output = model(tokens, decoding.context) if context else model(tokens)
    logits = logits_of(output)
    if given is None:
        return logits, None
    if logits.shape[:1] != tokens.shape[:1]:
        raise ValueError(
            f"model: expected logits (2B, L, V) for tokens {tuple(tokens.shape)} with cfg_scale, "
            f"got {tuple(logits.shape)}"
        )
    conditional, unconditional = logits.chunk(2)
    return conditional, unconditional


def logits_of(output: Any) -> Tensor:
    """What a model returned, or the ``logits`` of it."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        raise ValueError(f"model: expected logits (B, L, V) or an object with them, got {kind}")
    return logits


def _bar(progress: bool, masks: int) -> AbstractContextManager[Any]:
    if not progress:
        return nullcontext()
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            "progress: expected tqdm to be installed: pip install 'torch-winnow[progress]'"
        ) from error
    bar: AbstractContextManager[Any] = tqdm(total=masks, unit="token")
    return bar

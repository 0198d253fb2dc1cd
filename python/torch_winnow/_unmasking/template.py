"""Templates with named spans, and scores of spans; public in :mod:`torch_winnow.unmasking`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_winnow._unmasking.arguments import integer
from torch_winnow._unmasking.decoding import STEP_KEY
from torch_winnow._unmasking.generate import logits_of
from torch_winnow._unmasking.logit_stats import check_tensor, logit_stats, seed_tensor
from torch_winnow._unmasking.rules import Rule, TopK, check_rule, select
from torch_winnow._unmasking.step import (
    check_logits,
    check_tokens,
    order_seed,
    score_of,
    with_mask_id,
)

Ids = Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class Template:
    """A prompt with named spans to fill in: reasoning-as-infilling, arXiv 2510.19990.

    Args:
        parts: in order, either token ids, which are given, or a pair ``(name, length)``: a span of
            that many masks.
        mask_id: the mask's token id.

    Attributes:
        tokens: ``(L,)`` int64, with masks in every span.
        spans: [start, end) of each name.

    Example:
        >>> from torch_winnow.unmasking import Template
        >>> template = Template([[5, 6], ("reasoning", 3), [7], ("answer", 2)], mask_id=9)
        >>> template.tokens
        tensor([5, 6, 9, 9, 9, 7, 9, 9])
        >>> template.fill(answer=[1, 2])  # the answer is known: decode what leads to it
        tensor([5, 6, 9, 9, 9, 7, 1, 2])
        >>> template.read(template.fill(answer=[1, 2]), "answer")
        tensor([1, 2])
    """

    parts: Sequence[Ids | tuple[str, int]]
    mask_id: int
    tokens: Tensor = field(init=False)
    spans: dict[str, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        pieces: list[Tensor] = []
        spans: dict[str, tuple[int, int]] = {}
        at = 0
        if not isinstance(self.parts, Sequence):
            raise ValueError(f"parts: expected a list of token ids and spans, got {self.parts!r}")
        for part in self.parts:
            if isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], str):
                name, size = part[0], integer(f"parts: {part[0]}", part[1], 1)
                if name in spans:
                    raise ValueError(f"parts: expected every name once, got {name!r} twice")
                spans[name] = (at, at + size)
                piece = torch.full((size,), integer("mask_id", self.mask_id))
            else:
                piece = _ids("parts", part)
            pieces.append(piece)
            at += len(piece)
        empty = torch.zeros(0, dtype=torch.int64)
        object.__setattr__(self, "tokens", torch.cat([empty, *pieces]))
        object.__setattr__(self, "spans", spans)

    def positions(self, *names: str) -> Tensor:
        """``(L,)`` bool, true inside the named spans."""
        inside = torch.zeros(len(self.tokens), dtype=torch.bool)
        for name in names:
            start, end = self._span(name)
            inside[start:end] = True
        return inside

    def fill(self, /, **values: Ids) -> Tensor:
        """``(L,)``, the tokens with the named spans given; the others stay masked.

        Decoding it with a ``seed`` draws the rest given these: the reasoning given an answer.
        """
        tokens = self.tokens.clone()
        for name, value in values.items():
            start, end = self._span(name)
            ids = _ids(name, value)
            if len(ids) != end - start:
                raise ValueError(f"{name}: expected {end - start} token ids, got {len(ids)}")
            tokens[start:end] = ids
        return tokens

    def read(self, tokens: Tensor, name: str) -> Tensor:
        """``(..., length)``, the named span of decoded ``tokens (..., L)``."""
        start, end = self._span(name)
        check_tensor("tokens", tokens)
        if tokens.shape[-1:] != self.tokens.shape:
            raise ValueError(
                f"tokens: expected (..., {len(self.tokens)}), got {tuple(tokens.shape)}"
            )
        return tokens[..., start:end]

    def _span(self, name: str) -> tuple[int, int]:
        if not isinstance(name, str) or name not in self.spans:
            raise ValueError(f"name: expected one of {', '.join(self.spans)}, got {name!r}")
        return self.spans[name]


def _ids(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.dim() != 1 or value.is_floating_point() or value.dtype == torch.bool:
            raise ValueError(
                f"{name}: expected (n,) token ids, got {tuple(value.shape)} {value.dtype}"
            )
        return value.to("cpu", torch.int64)
    try:
        return torch.tensor([integer(name, i) for i in value], dtype=torch.int64)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected token ids, got {value!r}") from None


# The scored tokens are the targets, and one model call serves a step.
_NOT_OF_SCORES = (
    "mask",
    "target_ids",
    "previous_logits",
    "unconditional_logits",
    "cfg_scale",
    "vocab_start",
)


class SpanScore(NamedTuple):
    """What :func:`score_span` found.

    Attributes:
        log_prob: ``(B,)``, of all the positions together, in nats.
        log_probs: ``(B, L)``, of each token given those scored before it; 0 elsewhere.
        calls: how often the model was called.
    """

    log_prob: Tensor
    log_probs: Tensor
    calls: int


@torch.no_grad()
def score_span(
    model: Callable[[Tensor], Any],
    tokens: Tensor,
    positions: Tensor,
    *,
    mask_id: int,
    rule: Rule | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    **logit_stats_options: Any,
) -> SpanScore:
    """How likely given tokens are, by the chain rule in the order in which a rule would write them.

    The positions are masked; at each step the rule chooses some of them, their log-probability is
    added up, and the given tokens are written there: one position per call is the chain rule in
    that order, ``EntropyThreshold(float("inf"))`` scores all as independent in one call. Scores an
    answer given the reasoning, or a reasoning given the answer.

    Args:
        model: as in :func:`generate`.
        tokens: ``(B, L)`` int64 or int32, complete at ``positions``: ids that the model has logits
            of. The mask's own is impossible.
        positions: ``(B, L)`` or ``(L,)`` bool, what to score.
        mask_id: the mask's token id; it gets no probability.
        rule: as in :func:`unmask_step_`; None for ``TopK(1, score="entropy")``, the surest first.
        seed, generator: key of a random order, as in :func:`generate`; no token is drawn.
        logit_stats_options: as in :func:`logit_stats`.

    Returns:
        :class:`SpanScore`.

    Raises:
        ValueError: for a wrong shape, dtype or option.

    Example:
        >>> import torch
        >>> from torch_winnow.unmasking import score_span
        >>> coin = torch.zeros(1, 3, 2)
        >>> answer = torch.tensor([False, True, True])
        >>> score_span(lambda t: coin, torch.tensor([[0, 1, 1]]), answer, mask_id=2).log_prob
        tensor([-1.3863])
    """
    rule = TopK(1, score="entropy") if rule is None else rule
    check_tokens(tokens)
    check_rule(rule)
    mask_id = integer("mask_id", mask_id)
    for name in _NOT_OF_SCORES:
        if name in logit_stats_options:
            raise ValueError(f"{name}: score_span sets or cannot use it, so expected none")
    check_tensor("positions", positions)
    shapes = (tuple(tokens.shape), tuple(tokens.shape[1:]))
    if positions.dtype != torch.bool or tuple(positions.shape) not in shapes:
        raise ValueError(
            f"positions: expected {shapes[0]} or {shapes[1]} bool, got "
            f"{tuple(positions.shape)} {positions.dtype}"
        )
    suppress_ids = logit_stats_options.pop("suppress_ids", None)
    key = seed_tensor(seed, generator)
    key = None if key is None else key.to(tokens.device)
    masked = positions.to(tokens.device).expand(tokens.shape)
    current = tokens.masked_fill(masked, mask_id)
    log_probs = torch.zeros(tokens.shape, device=tokens.device)
    calls = 0
    while bool(masked.any()):
        logits = logits_of(model(current.clone()))
        check_logits(logits, tokens)
        _check_ids(tokens, masked, logits.shape[-1])
        stats = logit_stats(
            logits,
            mask=masked,
            target_ids=torch.where(masked, tokens, 0).to(torch.int64),
            suppress_ids=with_mask_id(mask_id, suppress_ids, logits),
            **logit_stats_options,
        )
        score = score_of(stats, rule)
        order = order_seed(rule, key, tokens)
        transfer, _ = select(score, masked, rule, step=calls, seed=order)
        key = None if key is None else key + STEP_KEY  # wraps around
        assert stats.target_log_prob is not None
        log_probs = torch.where(transfer, stats.target_log_prob.to(log_probs.dtype), log_probs)
        current = torch.where(transfer, tokens, current)
        masked = masked & ~transfer
        calls += 1
    return SpanScore(log_probs.sum(1), log_probs, calls)


def _check_ids(tokens: Tensor, masked: Tensor, vocab: int) -> None:
    outside = masked & ((tokens < 0) | (tokens >= vocab))
    if outside.any():
        raise ValueError(
            f"tokens: expected ids in [0, {vocab}) at positions, got {int(tokens[outside][0])}"
        )

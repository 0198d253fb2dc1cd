"""The published rules for which masked positions to unmask, and their common selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._unmasking.arguments import choice, count_or_none, integer, number

_select_positions = torch.ops.winnow.select_positions

# Numbered as in csrc/unmasking/selection_rule.h.
_LOWEST_FIRST, _HIGHEST_FIRST, _LEFT_TO_RIGHT, _RANDOM = range(4)
_BELOW, _AT_LEAST, _ENTROPY_BOUND, _CONFIDENCE_FACTOR, _ANY = range(5)
_ORDER_OF_SCORE = {
    "confidence": _HIGHEST_FIRST,
    "margin": _HIGHEST_FIRST,
    "entropy": _LOWEST_FIRST,
    "random": _RANDOM,
}


def adopt(rule: object, **values: object) -> None:
    """Sets the checked values of a frozen rule."""
    for name, value in values.items():
        object.__setattr__(rule, name, value)


@dataclass(frozen=True)
class EntropyThreshold:
    """Multi-token entropy decoding (MED, AR-MED): arXiv 2510.19990.

    ``order="any"``: the positions of entropy < ``threshold``, lowest first, at most ``max_tokens``.
    ``order="left_to_right"``: the longest left-to-right run of them, which keeps to the order of an
    autoregressive model. Where none qualifies: the lowest, or the leftmost.

    Attributes:
        threshold: nats; 0.2 in the paper.
        max_tokens: the most per row and step, or None.
        order: ``"any"`` or ``"left_to_right"``.
    """

    threshold: float
    max_tokens: int | None = None
    order: str = "any"
    score: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        choice("order", self.order, ("any", "left_to_right"))
        adopt(
            self,
            threshold=number("threshold", self.threshold),
            max_tokens=count_or_none("max_tokens", self.max_tokens),
        )


@dataclass(frozen=True)
class EntropyBound:
    """The largest set, by ascending entropy, with (sum of H) - (largest H) <= ``gamma``.

    It bounds the divergence between the joint distribution of the positions and the product that
    they are drawn from. Ben-Hamu et al., "Accelerated sampling from masked diffusion models via
    entropy bounded unmasking" (2025).

    Attributes:
        gamma: nats; 0.001 to 1.5 are in use.
    """

    gamma: float
    score: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        adopt(self, gamma=number("gamma", self.gamma, 0.0))


@dataclass(frozen=True)
class ConfidenceThreshold:
    """The positions of confidence >= ``threshold`` and the most confident one.

    Fast-dLLM: Wu et al., arXiv 2505.22618. Confidence is the probability of the chosen token.

    Attributes:
        threshold: a probability; 0.9 in the paper.
    """

    threshold: float
    score: ClassVar[str] = "confidence"

    def __post_init__(self) -> None:
        adopt(self, threshold=number("threshold", self.threshold))


@dataclass(frozen=True)
class ConfidenceFactor:
    """The n most confident positions, n the largest with (n + 1)(1 - c_(n)) < ``factor``.

    Fast-dLLM's other rule: greedy parallel decoding is then as good as sequential.

    Attributes:
        factor: 1 in the paper.
    """

    factor: float
    score: ClassVar[str] = "confidence"

    def __post_init__(self) -> None:
        adopt(self, factor=number("factor", self.factor))


@dataclass(frozen=True)
class TopK:
    """A fixed number of the best positions, as LLaDA and Dream decode.

    Attributes:
        num_tokens: positions per row and step, or one such number for each step (of a block, in
            :func:`generate`); after the last the schedule stays at it. Numbers below 1 act as 1.
        score: ``"confidence"`` (LLaDA), ``"margin"``, ``"entropy"`` (Dream) or ``"random"``.
        position_temperature: above 0 the positions are drawn, one after another and each at most
            once, in proportion to exp(score / position_temperature), where low entropies score
            high: Dream's ``alg_temp``. For :func:`generate` and :class:`Decoding`.
    """

    num_tokens: int | tuple[int, ...]
    score: str = "confidence"
    position_temperature: float = 0.0

    def __post_init__(self) -> None:
        counts = self.num_tokens
        try:
            if isinstance(counts, Sequence):
                adopt(self, num_tokens=tuple(integer("num_tokens", n) for n in counts))
            else:
                adopt(self, num_tokens=integer("num_tokens", counts))
        except ValueError:
            message = f"num_tokens: expected an int or one int per step, got {counts!r}"
            raise ValueError(message) from None
        if self.num_tokens == ():
            raise ValueError("num_tokens: expected at least one step, got an empty schedule")
        choice("score", self.score, tuple(_ORDER_OF_SCORE))
        temperature = number("position_temperature", self.position_temperature, 0.0)
        if temperature > 0.0 and self.score == "random":
            raise ValueError(
                f"position_temperature: expected 0 with score='random', got {temperature}"
            )
        adopt(self, position_temperature=temperature)

    def schedule(self) -> tuple[int, ...]:
        """The number of tokens of each step, the last one for all that follow."""
        return (self.num_tokens,) if isinstance(self.num_tokens, int) else self.num_tokens


@dataclass(frozen=True)
class PrefixThreshold:
    """The longest left-to-right run of masked positions whose score reaches ``threshold``.

    SDLM's longest-prefix decoding. ``>=`` for confidence and margin, ``<`` for entropy. Where the
    first does not qualify, it alone.

    Attributes:
        threshold: 0.9 in the paper.
        score: ``"confidence"``, ``"margin"`` or ``"entropy"``.
    """

    threshold: float
    score: str = "confidence"

    def __post_init__(self) -> None:
        adopt(self, threshold=number("threshold", self.threshold))
        choice("score", self.score, ("confidence", "margin", "entropy"))


Rule = (
    EntropyThreshold
    | EntropyBound
    | ConfidenceThreshold
    | ConfidenceFactor
    | TopK
    | PrefixThreshold
)


def check_rule(rule: object) -> None:
    if not isinstance(rule, Rule):
        raise ValueError(
            "rule: expected EntropyThreshold, EntropyBound, ConfidenceThreshold, "
            f"ConfidenceFactor, TopK or PrefixThreshold, got {type(rule).__name__}"
        )
    if isinstance(rule, TopK) and rule.position_temperature > 0.0:
        raise ValueError(
            "rule: expected position_temperature=0, as only generate and Decoding draw positions, "
            f"got {rule}"
        )


def _plan(rule: Rule, step: int) -> tuple[int, int, float, int]:
    """Order, criterion, threshold and limit (-1: none) of the native selection."""
    match rule:
        case EntropyThreshold():
            order = _LOWEST_FIRST if rule.order == "any" else _LEFT_TO_RIGHT
            limit = -1 if rule.max_tokens is None else rule.max_tokens
            return order, _BELOW, rule.threshold, limit
        case EntropyBound():
            return _LOWEST_FIRST, _ENTROPY_BOUND, rule.gamma, -1
        case ConfidenceThreshold():
            return _HIGHEST_FIRST, _AT_LEAST, rule.threshold, -1
        case ConfidenceFactor():
            return _HIGHEST_FIRST, _CONFIDENCE_FACTOR, rule.factor, -1
        case TopK():
            schedule = rule.schedule()
            limit = max(1, schedule[min(step, len(schedule) - 1)])
            return _ORDER_OF_SCORE[rule.score], _ANY, 0.0, limit
        case PrefixThreshold():
            criterion = _BELOW if rule.score == "entropy" else _AT_LEAST
            return _LEFT_TO_RIGHT, criterion, rule.threshold, -1


def select(
    score: Tensor,
    mask: Tensor,
    rule: Rule,
    *,
    window: Tensor | None = None,
    step: int = 0,
    at_least: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`select_positions` with a floor per row and a seed for the random order.

    With a floor, that alone is how many a :class:`TopK` takes: rows may be at different steps.
    """
    order, criterion, threshold, limit = _plan(rule, integer("step", step, 0))
    if criterion == _ANY and at_least is not None:
        limit = 1
    if order == _RANDOM and seed is None:
        order = _HIGHEST_FIRST
    if score.dtype in (torch.bfloat16, torch.float16):
        score = score.float()
    return _select_positions(  # type: ignore[no-any-return]
        score, mask, order, criterion, threshold, limit, window, at_least, seed
    )


def select_positions(
    score: Tensor, mask: Tensor, rule: Rule, *, window: Tensor | None = None, step: int = 0
) -> tuple[Tensor, Tensor]:
    """Which masked positions a rule unmasks now.

    At least one in every row that has a masked position in its window, never one outside. Equal
    scores go to the lowest position; a NaN comes last. Boundaries are part of the definitions:
    entropy < threshold, EntropyBound <=, confidence, margin and prefix >=; compared in float32, so
    that 0.9 in float32 reaches a threshold of 0.9, and in float64 for float64 scores.

    Args:
        score: ``(B, L)`` the rule's own quantity, as in :class:`LogitStats`: entropy is better low,
            confidence and margin high. For ``TopK(score="random")`` numbers drawn by the caller,
            highest first.
        mask: ``(B, L)`` bool, true where a position is still masked.
        rule: one of the rule classes of this module.
        window: ``(B, 2)`` int64, [start, end) of the positions to choose from, cut at 0 and L.
        step: which step of a :class:`TopK` schedule this is.

    Returns:
        ``transfer`` (B, L) bool and ``count`` (B,) int64, its number per row.

    Raises:
        ValueError: for a wrong shape or dtype, or something else than a rule.

    Example:
        >>> import torch
        >>> from torch_winnow.unmasking import EntropyThreshold, select_positions
        >>> entropy = torch.tensor([[0.1, 0.9, 0.15]])
        >>> masked = torch.tensor([[True, True, True]])
        >>> select_positions(entropy, masked, EntropyThreshold(0.2))
        (tensor([[ True, False,  True]]), tensor([2]))
    """
    check_rule(rule)
    for name, value in (("score", score), ("mask", mask), ("window", window)):
        if not (isinstance(value, Tensor) or (name == "window" and value is None)):
            raise ValueError(f"{name}: expected a tensor, got {value!r}")
    return select(score, mask, rule, window=window, step=step)


@register_fake("select_positions")
def _(
    score: Tensor,
    mask: Tensor,
    order: int,
    criterion: int,
    threshold: float,
    limit: int,
    window: Tensor | None,
    at_least: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_same_device(score=score, mask=mask, window=window, at_least=at_least, seed=seed)
    transfer = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    return transfer, score.new_empty(score.shape[:1], dtype=torch.int64)

"""What decoding returns, and what stops it; public in :mod:`torch_winnow.unmasking`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from torch_winnow._arguments import number
from torch_winnow._unmasking.logit_stats import LogitStats


class StepResult(NamedTuple):
    """What :func:`unmask_step_` did.

    Attributes:
        transfer: ``(B, L)`` bool, the positions that were written.
        count: ``(B,)`` int64, how many.
        stats: :class:`LogitStats` of the masked positions in the window.
    """

    transfer: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    stats: LogitStats


class GenerateResult(NamedTuple):
    """What :func:`generate` made.

    Attributes:
        tokens: ``(B, L)`` int64. Masks remain only where ``stop`` ended a row early.
        step_map: ``(B, L)`` int64, the step at which each token was written; -1 where it was given
            or is still masked.
        calls: how often the model was called: once per step, or less often under
            :class:`Remasking`, whose steps may change nothing.
        entropies: ``(B, L)`` float32, the entropy of each token's distribution when it was written,
            in nats; 0 elsewhere. Sum it over a span to score the span.
    """

    tokens: Tensor
    step_map: Tensor
    calls: int
    entropies: Tensor


class StepContext(NamedTuple):
    """What a model may want to know of the step it is called for.

    Attributes:
        window: ``(B, 2)`` int64, [start, end) of the block that each row is in.
        changed: ``(B, L)`` bool, the positions whose token is another than at the call before; all
            at the first call. A row without one gets the logits it got.
        active: ``(B,)`` bool, rows that are still being decoded; the logits of others are not read.
        time: ``(B,)`` float64 in [0, 1], how much of the block is noise by the clock of
            :class:`Remasking` or :class:`FirstHitting`; None under rules without one.
        mask_id: the mask's token id.
        block_length: as asked for, at most L; a window may be cut short by the end.
    """

    window: Tensor
    changed: Tensor
    active: Tensor
    time: Tensor | None
    mask_id: int
    block_length: int


@dataclass(frozen=True)
class AnswerEntropy:
    """Stops a row once the entropies of its answer sum to less than ``gamma`` nats.

    The early exit of reasoning-as-infilling (arXiv 2510.19990): the answer is then written at once
    and the rest of the row stays masked. Answer positions may lie outside the block that is being
    decoded; those already written count as 0.

    Attributes:
        positions: ``(B, L)`` or ``(L,)`` bool, where the answer stands; a row without one never
            stops.
        gamma: nats, for the whole answer; 0.1 in the paper.
    """

    positions: Tensor
    gamma: float

    def __post_init__(self) -> None:
        if not isinstance(self.positions, Tensor):
            raise ValueError(f"positions: expected a bool tensor, got {self.positions!r}")
        object.__setattr__(self, "gamma", number("gamma", self.gamma, 0.0))

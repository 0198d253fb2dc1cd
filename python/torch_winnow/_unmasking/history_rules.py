"""Rules that look at more than one step; :class:`Decoding` keeps what they remember.

Public in :mod:`torch_winnow.unmasking`. Two of them mask positions again: only positions that
decoding itself wrote, and only in the block that a row is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch_winnow._arguments import choice, integer, number
from torch_winnow._unmasking.rules import Rule, adopt


@dataclass(frozen=True)
class KLStability:
    """The positions whose distribution is sure and has stopped moving.

    KLASS: Kim et al., arXiv 2511.05664. A position is ready where its confidence is >
    ``threshold`` and, at each of the last ``history`` steps of its block, KL(current || previous
    step) was < ``kl_threshold``; all ready ones are written. Where none is, the ``num_tokens`` most
    confident. The first call has nothing to compare with, so nothing is ready then.

    Attributes:
        threshold: a probability; 0.9 in the paper.
        kl_threshold: nats; 0.01 in the paper.
        history: steps; 2 in the paper.
        num_tokens: positions per step where none is ready.
    """

    threshold: float = 0.9
    kl_threshold: float = 0.01
    history: int = 2
    num_tokens: int = 1
    score: ClassVar[str] = "confidence"

    def __post_init__(self) -> None:
        adopt(
            self,
            threshold=number("threshold", self.threshold),
            kl_threshold=number("kl_threshold", self.kl_threshold),
            history=integer("history", self.history, 1),
            num_tokens=integer("num_tokens", self.num_tokens, 1),
        )


@dataclass(frozen=True)
class DraftVerify:
    """Drafts widely, then masks again what no longer convinces, given what was written since.

    WINO: Hong et al., arXiv 2507.18578. A step writes the positions of confidence > ``draft``, the
    most confident first: at least one, at most 0.7 of the masks left in the block, cut to [5, 20].
    If it writes more than one, the tokens written earlier whose probability is now < ``verify`` are
    masked again, the least probable first, and fewer than the step before wrote: so every block
    ends.

    The model's logits at *written* positions have to be predictions that do not see the token
    itself. :class:`ShadowBlock` gets them from the same call.

    Attributes:
        draft: a probability; 0.6 in the paper.
        verify: a probability; 0.9 in the paper.
    """

    draft: float = 0.6
    verify: float = 0.9
    score: ClassVar[str] = "confidence"

    def __post_init__(self) -> None:
        adopt(self, draft=number("draft", self.draft), verify=number("verify", self.verify))


@dataclass(frozen=True)
class Remasking:
    """The ancestral sampler of masked diffusion, with remasking: a block takes ``steps`` steps.

    ReMDM: Wang et al., arXiv 2503.00307, on the linear schedule alpha(t) = 1 - t. Step i of n goes
    from t = 1 - i/n to s = 1 - (i+1)/n. Every written token is masked again with probability sigma,
    every mask is unmasked with probability (alpha(s) - (1 - sigma) alpha(t)) / (1 - alpha(t)), each
    position by itself: a step may write nothing, and none is needed where nothing changed. With
    sigma_max = min(1, (1 - alpha(s)) / alpha(t)), sigma is

    - ``"cap"``: min(``eta``, sigma_max);
    - ``"rescale"``: ``eta`` sigma_max;
    - ``"conf"``: sigma_max softmax(-p), p being the probability that each written token of the
      block had when it was written.

    ``eta=0`` never remasks: the sampler of MDLM, and Dream's ``"origin"``.

    Attributes:
        steps: per block.
        eta: in [0, 1]; 0.008 for ``"cap"`` and 0.015 for ``"rescale"`` in the paper, unused by
            ``"conf"``.
        schedule: ``"cap"``, ``"rescale"`` or ``"conf"``.
    """

    steps: int
    eta: float = 0.0
    schedule: str = "cap"
    score: ClassVar[str] = "confidence"

    def __post_init__(self) -> None:
        choice("schedule", self.schedule, ("cap", "rescale", "conf"))
        adopt(self, steps=integer("steps", self.steps, 1), eta=number("eta", self.eta, 0.0, 1.0))
        if self.schedule == "conf" and self.eta != 0.0:
            raise ValueError(f"eta: expected none with schedule='conf', got {self.eta}")


@dataclass(frozen=True)
class FirstHitting:
    """One token per step, at the times at which the continuous process would write it.

    Zheng et al., arXiv 2409.02908: exact for every number of steps, with no more calls than there
    are tokens. With n masks left at time t the next is written at t u^(1/n), u uniform in (0, 1),
    at a random position (linear schedule, from t = 1 at the start of a block). A model that depends
    on the time reads it from :class:`StepContext`; for one that does not this is ``TopK(1,
    score="random")``.
    """

    score: ClassVar[str] = "random"


DecodingRule = Rule | KLStability | DraftVerify | Remasking | FirstHitting


def check_decoding_rule(rule: object) -> None:
    if not isinstance(rule, DecodingRule):
        raise ValueError(
            "rule: expected EntropyThreshold, EntropyBound, ConfidenceThreshold, "
            "ConfidenceFactor, TopK, PrefixThreshold, KLStability, DraftVerify, Remasking or "
            f"FirstHitting, got {type(rule).__name__}"
        )

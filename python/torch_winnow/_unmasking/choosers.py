"""What each rule remembers over the steps of a decode, and what it writes and masks again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_winnow._unmasking.history_rules import (
    DecodingRule,
    DraftVerify,
    FirstHitting,
    KLStability,
    Remasking,
)
from torch_winnow._unmasking.logit_stats import LogitStats
from torch_winnow._unmasking.rules import Rule, TopK, select
from torch_winnow._unmasking.step import order_seed, score_of

_BEST = TopK(1)
_LOWEST = TopK(1, score="entropy")
_ANY = TopK(1, score="random")


@dataclass
class View:
    """A step as a rule sees it.

    Attributes:
        masked: ``(B, L)``, what may be written: the masks of each row's window.
        written: ``(B, L)``, what decoding itself wrote in the window.
        step: ``(B,)``, steps since the row came to its block.
        at_least: ``(B,)``, the fewest tokens to write.
        seed: key of this step's draws, or None.
    """

    masked: Tensor
    written: Tensor
    step: Tensor
    at_least: Tensor
    seed: Tensor | None


class Chooser:
    """The rules of one step: nothing is remembered."""

    time: Tensor | None = None  # (B,) of the coming step, for rules that live in time
    steps: int | None = None  # of a block, for rules that take a fixed number

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def begin(self, view: View) -> None:
        """Before the model is called."""

    def options(self, tokens: Tensor, view: View, logits: Tensor) -> dict[str, Any]:
        """Further options of ``logit_stats``."""
        return {}

    def measured(self, view: View) -> Tensor:
        return view.masked

    def choose(self, view: View, stats: LogitStats) -> tuple[Tensor, Tensor | None]:
        """What to write, and what to mask again."""
        seed = order_seed(self.rule, view.seed, view.masked)
        score = score_of(stats, self.rule)
        return select(score, view.masked, self.rule, at_least=view.at_least, seed=seed)[0], None

    def end(self, written: Tensor, stats: LogitStats) -> None:
        """After ``written`` was written."""


class DrawnTopKChooser(Chooser):
    """The k largest of score / temperature + Gumbel noise: k draws without replacement."""

    rule: TopK

    def choose(self, view: View, stats: LogitStats) -> tuple[Tensor, Tensor | None]:
        score = score_of(stats, self.rule).double()
        score = -score if self.rule.score == "entropy" else score
        gumbel = -(-uniforms(_drawn_seed(view), *view.masked.shape).log()).log()
        score = score / self.rule.position_temperature + gumbel
        return select(score, view.masked, _BEST, at_least=view.at_least)[0], None


class StabilityChooser(Chooser):
    def __init__(self, rule: KLStability, tokens: Tensor) -> None:
        self.stability = rule
        self._previous: Tensor | None = None
        self._run = torch.zeros_like(tokens, dtype=torch.int64)

    def options(self, tokens: Tensor, view: View, logits: Tensor) -> dict[str, Any]:
        previous, self._previous = self._previous, logits
        if previous is None:
            return {}
        if previous.data_ptr() == logits.data_ptr() and logits.numel() > 0:
            raise RuntimeError(
                "model: expected new logits at every call, got those of the step before "
                "overwritten; KLStability compares the two, so return a copy"
            )
        return {"previous_logits": previous}

    def choose(self, view: View, stats: LogitStats) -> tuple[Tensor, Tensor | None]:
        rule = self.stability
        run = torch.where((view.step == 0)[:, None], 0, self._run)
        if stats.kl is None:
            self._run = torch.zeros_like(run)
        else:
            self._run = torch.where(stats.kl < rule.kl_threshold, run + 1, 0)
        confidence = score_of(stats, _BEST)
        ready = view.masked & (self._run >= rule.history) & (confidence > rule.threshold)
        fewest = view.at_least.clamp(min=rule.num_tokens)
        best, _ = select(confidence, view.masked, _BEST, at_least=fewest)
        enough = ready.sum(1) >= view.at_least
        return torch.where(enough[:, None], ready, best), None


class DraftVerifyChooser(Chooser):
    def __init__(self, rule: DraftVerify, tokens: Tensor) -> None:
        self.thresholds = rule
        self._last = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)

    def options(self, tokens: Tensor, view: View, logits: Tensor) -> dict[str, Any]:
        return {"target_ids": tokens.to(torch.int64).clamp(0, logits.shape[-1] - 1)}

    def measured(self, view: View) -> Tensor:
        return view.masked | view.written

    def choose(self, view: View, stats: LogitStats) -> tuple[Tensor, Tensor | None]:
        confidence = score_of(stats, _BEST)
        drafted = (view.masked & (confidence > self.thresholds.draft)).sum(1)
        most = (view.masked.sum(1) * 7 // 10).clamp(5, 20)
        accepted = torch.minimum(drafted, most)
        transfer, count = select(confidence, view.masked, _BEST, at_least=accepted.clamp(min=1))

        assert stats.target_log_prob is not None
        probability = stats.target_log_prob.exp()
        doubtful = view.written & (probability < self.thresholds.verify)
        most = torch.where(count > 1, self._last - 1, 0)
        remasked = torch.minimum(doubtful.sum(1), most)
        doubtful = doubtful & (remasked > 0)[:, None]
        self._last = count
        return transfer, select(probability, doubtful, _LOWEST, at_least=remasked)[0]


class RemaskingChooser(Chooser):
    def __init__(self, rule: Remasking, tokens: Tensor) -> None:
        self.remasking = rule
        self.steps = rule.steps
        self._probability = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)

    def begin(self, view: View) -> None:
        self.time = (1.0 - view.step.double() / self.remasking.steps).clamp(min=0.0)

    def choose(self, view: View, stats: LogitStats) -> tuple[Tensor, Tensor | None]:
        n = self.remasking.steps
        step = view.step.clamp(max=n - 1)[:, None].double()  # a NaN row may stay longer
        alpha_t, alpha_s = step / n, (step + 1) / n
        sigma = self._sigma(view, alpha_t, alpha_s)
        unmask = (alpha_s - (1.0 - sigma) * alpha_t) / (1.0 - alpha_t)
        chance = uniforms(_drawn_seed(view), *view.masked.shape)
        return view.masked & (chance < unmask), view.written & (chance < sigma)

    def _sigma(self, view: View, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        # At the first step alpha_t is 0 and nothing is written yet: any number but NaN will do.
        largest = ((1.0 - alpha_s) / alpha_t.clamp(min=1e-300)).clamp(max=1.0)
        if self.remasking.schedule == "cap":
            return largest.clamp(max=self.remasking.eta)
        if self.remasking.schedule == "rescale":
            return largest * self.remasking.eta
        weights = torch.where(view.written, (-self._probability).exp(), 0.0)
        return largest * weights / weights.sum(1, keepdim=True).clamp(min=1e-300)

    def end(self, written: Tensor, stats: LogitStats) -> None:
        self._probability = torch.where(written, stats.log_prob.double().exp(), self._probability)


class FirstHittingChooser(Chooser):
    def __init__(self, tokens: Tensor) -> None:
        super().__init__(_ANY)
        self.time = torch.ones(tokens.shape[0], dtype=torch.float64, device=tokens.device)

    def begin(self, view: View) -> None:
        left = view.masked.sum(1)
        uniform = 1.0 - uniforms(_drawn_seed(view), left.shape[0], 1)[:, 0]  # in (0, 1]
        assert self.time is not None
        before = torch.where(view.step == 0, 1.0, self.time)
        self.time = torch.where(left > 0, before * uniform ** (1.0 / left.clamp(min=1)), before)


def _drawn_seed(view: View) -> Tensor:
    """The step's key; chance is needed even where tokens are the argmax."""
    seed = order_seed(_ANY, view.seed, view.masked)
    assert seed is not None
    return seed


def chooser_of(rule: DecodingRule, tokens: Tensor) -> Chooser:
    match rule:
        case KLStability():
            return StabilityChooser(rule, tokens)
        case DraftVerify():
            return DraftVerifyChooser(rule, tokens)
        case Remasking():
            return RemaskingChooser(rule, tokens)
        case FirstHitting():
            return FirstHittingChooser(tokens)
        case TopK() if rule.position_temperature > 0.0:
            return DrawnTopKChooser(rule)
        case _:
            return Chooser(rule)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


# Key of these draws, apart from those of tokens and of random orders; and splitmix64's constants.
_CHANCE_KEY = _signed(0xD1B54A32D192ED03)
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser; int64 wraps around, shifts are made logical by a mask."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX[0]
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX[1]
    return x ^ ((x >> 31) & (2**33 - 1))


def uniforms(seed: Tensor, batch: int, length: int) -> Tensor:
    """``(batch, length)`` float64 in [0, 1), keyed by the seed, the row and the position."""
    row = torch.arange(1, batch + 1, device=seed.device)
    column = torch.arange(1, length + 1, device=seed.device)
    key = _mixed(_mixed(seed ^ _CHANCE_KEY) + row * _GOLDEN)
    bits = _mixed(key[:, None] + column * _GOLDEN)
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53

"""What the rules that look back remember of one row, and what they do: the definitions."""

from __future__ import annotations

import math

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
from torch_winnow._unmasking.rules import Rule, TopK
from torch_winnow.reference._selection import select


class History:
    """A rule that remembers nothing."""

    steps = 1  # of a block, at least

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def begin(self, masks: int, step: int) -> float | None:
        """The time of the coming step."""
        return None

    def previous_logits(self, logits: Tensor) -> Tensor | None:
        return None

    def choose(
        self,
        score: Tensor,
        stats: LogitStats,
        masked: Tensor,
        written: Tensor,
        step: int,
        least: int,
    ) -> tuple[Tensor, Tensor]:
        transfer, _ = select(score, masked, self.rule, None, step, least)
        return transfer, torch.zeros_like(masked)

    def end(self, written: Tensor, stats: LogitStats) -> None:
        pass


class DrawnTopK(History):
    def __init__(self, rule: TopK, generator: torch.Generator | None) -> None:
        self.topk = rule
        self.generator = generator

    def choose(
        self,
        score: Tensor,
        stats: LogitStats,
        masked: Tensor,
        written: Tensor,
        step: int,
        least: int,
    ) -> tuple[Tensor, Tensor]:
        schedule = self.topk.schedule()
        count = max(1, least, schedule[min(step, len(schedule) - 1)])
        sign = -1.0 if self.topk.score == "entropy" else 1.0
        weight = (sign * score[masked].double() / self.topk.position_temperature).softmax(0)
        drawn = torch.multinomial(weight, min(count, len(weight)), generator=self.generator)
        transfer = torch.zeros_like(masked)
        transfer[0, masked[0].nonzero()[drawn, 0]] = True
        return transfer, torch.zeros_like(masked)


class Stability(History):
    def __init__(self, rule: KLStability) -> None:
        self.limits = rule
        self.previous: Tensor | None = None
        self.divergences: list[Tensor] = []

    def previous_logits(self, logits: Tensor) -> Tensor | None:
        previous, self.previous = self.previous, logits
        return previous

    def choose(
        self,
        score: Tensor,
        stats: LogitStats,
        masked: Tensor,
        written: Tensor,
        step: int,
        least: int,
    ) -> tuple[Tensor, Tensor]:
        rule = self.limits
        if step == 0:
            self.divergences = []
        infinite = torch.full(masked.shape, math.inf)
        self.divergences.append(infinite if stats.kl is None else stats.kl)
        ready = masked & (score > rule.threshold)
        if len(self.divergences) < rule.history:
            ready = torch.zeros_like(masked)
        for divergence in self.divergences[-rule.history :]:
            ready = ready & (divergence < rule.kl_threshold)
        if int(ready.sum()) < least:
            ready, _ = select(score, masked, TopK(rule.num_tokens), None, 0, least)
        return ready, torch.zeros_like(masked)


class Drafts(History):
    def __init__(self, rule: DraftVerify) -> None:
        self.limits = rule
        self.last = 0

    def choose(
        self,
        score: Tensor,
        stats: LogitStats,
        masked: Tensor,
        written: Tensor,
        step: int,
        least: int,
    ) -> tuple[Tensor, Tensor]:
        left = int(masked.sum())
        most = min(max(left * 7 // 10, 5), 20)
        drafted = int((masked & (score > self.limits.draft)).sum())
        transfer, count = select(score, masked, TopK(max(1, min(drafted, most))), None, 0, 1)

        assert stats.target_log_prob is not None
        probability = stats.target_log_prob.exp()
        doubtful = written & (probability < self.limits.verify)
        remasked = min(int(doubtful.sum()), self.last - 1) if int(count) > 1 else 0
        self.last = int(count)
        remask = torch.zeros_like(masked)
        if remasked > 0:
            remask, _ = select(probability, doubtful, TopK(remasked, "entropy"), None, 0, 1)
        return transfer, remask


class Ancestral(History):
    def __init__(self, rule: Remasking, length: int, generator: torch.Generator | None) -> None:
        self.remasking = rule
        self.steps = rule.steps
        self.generator = generator
        self.probability = torch.zeros(1, length, dtype=torch.float64)

    def begin(self, masks: int, step: int) -> float | None:
        return 1 - step / self.steps

    def choose(
        self,
        score: Tensor,
        stats: LogitStats,
        masked: Tensor,
        written: Tensor,
        step: int,
        least: int,
    ) -> tuple[Tensor, Tensor]:
        alpha_t, alpha_s = step / self.steps, (step + 1) / self.steps
        most = 1.0 if alpha_t == 0 else min(1.0, (1 - alpha_s) / alpha_t)
        sigma = torch.zeros(masked.shape, dtype=torch.float64)
        if self.remasking.schedule == "cap":
            sigma[:] = min(self.remasking.eta, most)
        elif self.remasking.schedule == "rescale":
            sigma[:] = self.remasking.eta * most
        elif written.any():
            sigma[written] = most * (-self.probability[written]).softmax(0)
        unmask = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        chance = torch.rand(masked.shape, dtype=torch.float64, generator=self.generator)
        return masked & (chance < unmask), written & (chance < sigma)

    def end(self, written: Tensor, stats: LogitStats) -> None:
        self.probability[written] = stats.log_prob[written].double().exp()


class Hitting(History):
    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__(TopK(1, score="random"))
        self.generator = generator
        self.time = 1.0

    def begin(self, masks: int, step: int) -> float | None:
        if step == 0:
            self.time = 1.0
        self.time *= float(torch.rand((), generator=self.generator)) ** (1 / masks)
        return self.time


def history_of(rule: DecodingRule, length: int, generator: torch.Generator | None) -> History:
    match rule:
        case KLStability():
            return Stability(rule)
        case DraftVerify():
            return Drafts(rule)
        case Remasking():
            return Ancestral(rule, length, generator)
        case FirstHitting():
            return Hitting(generator)
        case TopK() if rule.position_temperature > 0:
            return DrawnTopK(rule, generator)
        case _:
            return History(rule)

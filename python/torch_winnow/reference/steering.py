"""Definition of Feynman-Kac steering as a whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_winnow._resampling.gather import Tree
from torch_winnow._resampling.resample import Resampling
from torch_winnow._resampling.steering import PotentialState, _step_key
from torch_winnow.reference.resampling import (
    gather_particles,
    resample,
    statistics,
    without_nan,
)


def fk_potential(
    reward: Tensor,
    state: PotentialState | None,
    *,
    kind: str,
    lmbda: float,
    terminal: bool = False,
) -> tuple[Tensor, PotentialState]:
    """Particle by particle in Python numbers: the paper's potentials, in logarithms."""
    r = without_nan(statistics(reward))
    past = torch.zeros_like(r) if state is None else state.log_product
    log_potential, statistic = torch.empty_like(r), torch.empty_like(r)
    for at in range(r.numel()):
        now, product = r.view(-1)[at].item(), past.view(-1)[at].item()
        before = None if state is None else state.reward.view(-1)[at].item()
        if kind == "difference":
            value, potential = now, lmbda * (now - (before or 0.0)) if lmbda else 0.0
        elif kind == "max":
            value = now if before is None else max(before, now)
            potential = lmbda * value if lmbda else 0.0
        else:
            value = now if before is None else before + now
            potential = lmbda * value if lmbda else 0.0
        if terminal and lmbda:
            potential = lmbda * now - product
        if product in (torch.inf, -torch.inf):  # cannot be divided out any more
            potential = 0.0
        if now == -torch.inf:  # a broken constraint ends the particle, whatever came before
            potential = now
        log_potential.view(-1)[at], statistic.view(-1)[at] = potential, value
    log_product = without_nan(past + log_potential)
    return log_potential, PotentialState(without_nan(statistic), log_product)


class FKSteering:
    """Every particle remembers the rewards of its whole path, and all else is worked out from them.

    The weight of a particle is the product of the potentials of its path since its population was
    last resampled, times the weight that was left to it then.
    """

    def __init__(
        self,
        kind: str = "difference",
        lmbda: float = 1.0,
        *,
        ess_threshold: float | None = 0.5,
        scheme: str = "systematic",
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.kind, self.lmbda = kind, lmbda
        self.ess_threshold, self.scheme = ess_threshold, scheme
        self.seed, self.generator = seed, generator
        self.steps = 0
        self.reset()

    def reset(self) -> None:
        """Begin a new run."""
        self._path: list[Tensor] = []

    def step(self, reward: Tensor, *, terminal: bool = False) -> Resampling:
        """Take the rewards of a step, decide who follows whom."""
        if not self._path:
            self._counted_from = torch.zeros(reward.shape[:-1], dtype=torch.int64)
            self._divided_out = torch.zeros(reward.shape[:-1])
            self._left = torch.zeros(reward.shape)
        self._path.append(reward)
        state: PotentialState | None = None
        log_weights = self._left
        for at, past in enumerate(self._path):
            last = terminal and at == len(self._path) - 1
            log_potential, state = fk_potential(
                past, state, kind=self.kind, lmbda=self.lmbda, terminal=last
            )
            counts = (at >= self._counted_from).unsqueeze(-1)
            log_weights = log_weights + torch.where(counts, log_potential, 0.0)
        result = resample(
            log_weights,
            scheme=self.scheme,
            ess_threshold=self.ess_threshold,
            keep_slots=True,
            seed=None if self.seed is None else _step_key(self.seed, self.steps),
            generator=self.generator,
        )
        self.steps += 1
        self._path = gather_particles(self._path, result.ancestors)
        self._counted_from = torch.where(result.resampled, len(self._path), self._counted_from)
        self._divided_out = self._divided_out + result.log_z
        self._left = torch.where(result.resampled.unsqueeze(-1), result.log_weights, self._left)
        self.log_weights = result.log_weights
        return result

    @property
    def weights(self) -> Tensor:
        return self.log_weights.softmax(-1).nan_to_num(nan=0.0)

    @property
    def reward(self) -> Tensor:
        return self._path[-1]

    @property
    def log_z(self) -> Tensor:
        log_mean = self.log_weights.logsumexp(-1) - math.log(max(self.log_weights.shape[-1], 1))
        return self._divided_out + log_mean

    def best(self) -> Tensor:
        """The slot of each population's highest reward."""
        return self.reward.nan_to_num(nan=-torch.inf).argmax(-1)

    def select(self, tree: Tree) -> Tree:
        """The rows of a tree of tensors that belong to :meth:`best`."""
        best = self.best()
        chosen = gather_particles(tree, best.unsqueeze(-1))
        squeezed: Tree = tree_map_only(Tensor, lambda leaf: leaf.squeeze(best.dim()), chosen)
        return squeezed

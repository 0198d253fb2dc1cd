"""Feynman-Kac correctors: sampling from powers and products of diffusion models (Skreta et al.,
"Feynman-Kac correctors in diffusion", arXiv 2503.02819), against integrals on a grid.

Models with densities q_i(x, t), the data convolved with N(0, t), combine to the target
p_t ~ prod_i q_i^b_i. Follow s = sum_i b_i grad log q_i as if it were the score of p_t, from much
noise to none, and the samples are wrong by what the Fokker-Planck equation leaves over: each path
gathers

    d log w = (s^2 - sum_i b_i (grad log q_i)^2) / 2  dt

and resampling by w mends it. One model with b = 2 is annealing, (1, 1) a product, (1 - g, g) is
classifier-free guidance with scale g, whose samples are otherwise from no known distribution.
"""

from __future__ import annotations

import math

import pytest
import torch

from torch_winnow.resampling import gather_particles, resample

START, POPULATIONS, PARTICLES, STEPS = 4.0, 24, 1024, 60


class Mixture:
    """A Gaussian mixture in one dimension and its diffusion."""

    def __init__(self, share, mean, variance):
        self.share, self.mean, self.variance = (
            torch.tensor(numbers, dtype=torch.float64) for numbers in (share, mean, variance)
        )

    def _terms(self, x, t):
        variance = self.variance + t
        square = (x.unsqueeze(-1) - self.mean) ** 2
        return self.share.log() - 0.5 * (2 * math.pi * variance).log() - square / (2 * variance)

    def log_density(self, x, t):
        return self._terms(x, t).logsumexp(-1)

    def score(self, x, t):
        pull = (self.mean - x.unsqueeze(-1)) / (self.variance + t)
        return (self._terms(x, t).softmax(-1) * pull).sum(-1)


WIDE = Mixture([0.4, 0.6], [-1.5, 1.0], [0.5, 0.8])
NARROW = Mixture([0.7, 0.3], [-1.0, 1.5], [0.4, 0.4])
GUIDE = Mixture([0.8, 0.2], [-1.5, 1.0], [0.3, 0.3])


def combine(models, powers, *, corrected):
    """Per population: the estimated integral of prod q_i^b_i, and weighted first two moments."""
    generator = torch.Generator().manual_seed(0)
    total = sum(powers)
    # From a Gaussian that is wider than the target at the start, by importance weights.
    width = (1.5 * (START + 2) / total) ** 0.5
    z = torch.randn(POPULATIONS, PARTICLES, generator=generator, dtype=torch.float64)
    x = width * z
    log_w = 0.5 * z**2 + math.log(width * (2 * math.pi) ** 0.5)
    for model, power in zip(models, powers, strict=True):
        log_w = log_w + power * model.log_density(x, START)
    log_z = torch.zeros(POPULATIONS, dtype=torch.float64)
    least = 1e-3  # steps shrink with the noise, down to this much
    times = torch.linspace(math.log(START + least), math.log(least), STEPS + 1).double().exp()
    times = (times - least).clamp(min=0)
    for step in range(STEPS):
        dt = times[step] - times[step + 1]
        scores = [model.score(x, times[step]) for model in models]
        s = sum(power * score for power, score in zip(powers, scores, strict=True))
        if corrected:
            each = sum(power * score**2 for power, score in zip(powers, scores, strict=True))
            log_w = log_w + 0.5 * (s**2 - each) * dt
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = x + s * dt + dt**0.5 * noise
        result = resample(log_w, ess_threshold=0.5, seed=step)
        x = gather_particles(x, result.ancestors)
        log_w, log_z = result.log_weights, log_z + result.log_z
    weight = log_w.softmax(-1)
    integral = (log_z + log_w.logsumexp(-1)).exp() / PARTICLES
    return integral, (weight * x).sum(-1), (weight * x**2).sum(-1)


@pytest.mark.parametrize(
    ("models", "powers", "uncorrected_error"),
    [
        ([WIDE], [2.0], 0.3),
        ([WIDE, NARROW], [1.0, 1.0], 0.3),
        ([WIDE, GUIDE], [-1.0, 2.0], 0.15),
    ],
    ids=["annealed", "product", "guidance"],
)
def test_corrected_paths_have_the_combined_distribution(models, powers, uncorrected_error):
    """Within 5 sigma over 24 populations and 6% for the error of Euler's steps, which halves with
    twice as many. Without the weights the second moment is off by much more."""
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = sum(
        power * model.log_density(grid, 0.0) for model, power in zip(models, powers, strict=True)
    ).exp()
    exact = [torch.trapezoid(density * grid**power, grid) for power in range(3)]
    exact = [exact[0], exact[1] / exact[0], exact[2] / exact[0]]
    estimates = combine(models, powers, corrected=True)
    for estimate, value in zip(estimates, exact, strict=True):
        sigma = estimate.std() / POPULATIONS**0.5
        assert sigma < 0.1
        assert abs(estimate.mean() - value) < 5 * sigma + 0.06 * exact[2].clamp(max=1)
    _, _, second = combine(models, powers, corrected=False)
    assert abs(second.mean() - exact[2]) > uncorrected_error

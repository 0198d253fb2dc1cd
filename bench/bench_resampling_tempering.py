"""next_temperature against bisection with torch and with the package particles."""

from __future__ import annotations

import numpy
import pytest
import torch

from torch_winnow import reference
from torch_winnow.resampling import next_temperature

TARGET = 0.5


def torch_bisection(log_likelihood: torch.Tensor, rounds: int = 24) -> torch.Tensor:
    """All populations at once, to the 24 bits of a float; one exponential a particle and round."""
    low = log_likelihood.new_zeros(log_likelihood.shape[:-1])
    high = torch.ones_like(low)
    relative = log_likelihood - log_likelihood.amax(-1, keepdim=True)
    wanted = TARGET * log_likelihood.shape[-1]
    for _ in range(rounds):
        middle = (low + high) / 2
        w = (middle.unsqueeze(-1) * relative).exp_()
        enough = w.sum(-1) ** 2 >= wanted * w.square().sum(-1)
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def particles_package(log_likelihood: torch.Tensor) -> float:
    """As ``AdaptiveTempering`` of the package: a root of the size, by scipy."""
    from particles import resampling as rs
    from scipy import optimize

    x = log_likelihood[0].numpy()
    wanted = TARGET * len(x)
    return optimize.brentq(lambda e: rs.essl(e * x) - wanted, 0.0, 1.0)


IMPLS = {
    "winnow": lambda x: next_temperature(x, 0.0, TARGET),
    "torch": torch_bisection,
    "particles": particles_package,
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape", [(1, 64), (1, 4096), (4096, 64), (256, 4096), (1, 1_000_000)], ids=str
)
def test_next_temperature(measure, shape, impl):
    if impl == "particles":
        pytest.importorskip("particles")
        if shape[0] > 1:
            pytest.skip("particles takes one population at a time")
    log_likelihood = 30 * torch.randn(shape)
    few = log_likelihood[:2, :5000]
    numpy.testing.assert_allclose(
        next_temperature(few, 0.0, TARGET), reference.next_temperature(few, 0.0, TARGET), rtol=1e-5
    )
    numpy.testing.assert_allclose(
        IMPLS[impl](log_likelihood), next_temperature(log_likelihood, 0.0, TARGET), atol=1e-6
    )
    measure(
        f"next_temperature {shape[0]}x{shape[1]} float32",
        impl,
        IMPLS[impl],
        inputs=[(30 * torch.randn(shape),) for _ in range(3)],
        moved_bytes=log_likelihood.nbytes,
        rounds=7,
    )

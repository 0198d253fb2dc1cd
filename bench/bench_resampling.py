"""resample against the strongest rivals: a torch composition, ``particles``, blackjax.

Ours returns ancestors, offspring, carried weights, ESS and log Z; the torch composition returns
ancestors, ESS and log Z; ``particles`` and blackjax normalise and return ancestors only.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from torch_winnow.resampling import resample

SHAPES = [(1, 64), (1, 4096), (1, 1_000_000), (4096, 4), (4096, 64), (256, 4096), (4, 1_000_000)]
SCHEMES = ("stratified", "residual", "multinomial", "ssp", "killing")
RIVALS = {  # who has which
    "torch": ("stratified", "multinomial"),
    "particles": SCHEMES,
    "blackjax": ("stratified", "residual", "multinomial"),
}


def winnow(log_weights, scheme="systematic", **options):
    return resample(log_weights, scheme=scheme, seed=1, **options)


def torch_composition(log_weights, scheme="systematic"):
    particles = log_weights.shape[-1]
    share = log_weights.softmax(-1)
    ess = (share * share).sum(-1).reciprocal()
    log_z = log_weights.logsumexp(-1) - math.log(particles)
    if scheme == "multinomial":
        return torch.multinomial(share, particles, replacement=True), ess, log_z
    draws = 1 if scheme == "systematic" else particles
    u = torch.rand(*log_weights.shape[:-1], draws)
    points = (torch.arange(particles) + u) / particles
    ancestors = torch.searchsorted(share.cumsum(-1), points).clamp_(max=particles - 1)
    return ancestors, ess, log_z


def particles_package(log_weights, scheme="systematic"):
    from particles import resampling

    weights = resampling.exp_and_normalise(log_weights)
    return getattr(resampling, scheme)(weights, M=len(weights))


def blackjax(log_weights, scheme="systematic"):
    import jax
    from blackjax.smc import resampling

    if scheme not in _compiled:
        choose = getattr(resampling, scheme)
        _compiled[scheme] = jax.jit(
            jax.vmap(lambda key, log_w: choose(key, jax.nn.softmax(log_w), log_w.shape[0]))
        )
    keys = jax.random.split(jax.random.PRNGKey(0), log_weights.shape[0])
    return _compiled[scheme](keys, log_weights).block_until_ready()


_compiled: dict = {}


FUNCTIONS = {
    "winnow": winnow,
    "torch": torch_composition,
    "particles": particles_package,
    "blackjax": blackjax,
}


def inputs_for(impl, shape):
    if impl == "particles":
        pytest.importorskip("particles")
        if shape[0] > 1:
            pytest.skip("particles takes one population at a time")
        return [(np.random.default_rng(i).standard_normal(shape[1]),) for i in range(4)]
    if impl == "blackjax":
        jax = pytest.importorskip("jax")
        pytest.importorskip("blackjax")
        return [(jax.numpy.asarray(torch.randn(shape).numpy()),) for _ in range(4)]
    return [(torch.randn(shape),) for _ in range(4)]


def check(log_weights):
    """Every contract that a benchmark of a wrong answer would break."""
    result = winnow(log_weights)
    particles = log_weights.shape[-1]
    assert (result.offspring.sum(-1) == particles).all()
    shares = particles * log_weights.double().softmax(-1).cumsum(-1)
    assert (result.offspring.cumsum(-1) - shares).abs().max() < 1 + 1e-6 * particles
    torch.testing.assert_close(
        result.log_z, log_weights.logsumexp(-1) - math.log(particles), rtol=1e-4, atol=1e-4
    )


def least_bytes(shape):
    return shape[0] * shape[1] * (4 + 8 + 8 + 4)


@pytest.mark.parametrize("impl", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_systematic(measure, shape, impl):
    inputs = inputs_for(impl, shape)
    check(torch.randn(shape))
    measure(
        f"resample systematic {shape[0]}x{shape[1]} float32",
        impl,
        FUNCTIONS[impl],
        inputs=inputs,
        moved_bytes=least_bytes(shape),
    )


@pytest.mark.parametrize("impl", FUNCTIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(1, 4096), (4096, 4), (4096, 64), (1, 1_000_000)], ids=str)
def test_schemes(measure, shape, scheme, impl):
    if scheme not in RIVALS.get(impl, SCHEMES):
        pytest.skip(f"{impl} has no {scheme} scheme, or takes one population at a time")
    slow = impl == "torch" and scheme == "multinomial" and shape[1] > 2**17  # half a second a call
    measure(
        f"resample {scheme} {shape[0]}x{shape[1]} float32",
        impl,
        lambda log_weights: FUNCTIONS[impl](log_weights, scheme),
        inputs=inputs_for(impl, shape),
        moved_bytes=least_bytes(shape),
        rounds=3 if slow else 15,
    )

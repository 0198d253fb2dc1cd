"""Gradients: of statistics of weights, of log_z, and through the choice of ancestors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from torch_winnow.resampling import (
    conditional_effective_sample_size,
    effective_sample_size,
    log_mean_exp,
    normalised_weights,
    resample,
    weight_entropy,
)

INF = float("inf")
NAN = float("nan")
STATISTICS = (effective_sample_size, weight_entropy, log_mean_exp, normalised_weights)


def doubles(*shape: int) -> torch.Tensor:
    return (2 * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("function", STATISTICS, ids=lambda f: f.__name__)
def test_statistics(function):
    for shape in ((2, 7), (1,), (0, 3), (2, 0)):
        assert gradcheck(function, doubles(*shape))
    assert gradgradcheck(function, doubles(2, 4))


def test_conditional_size():
    pair = doubles(2, 7), doubles(2, 7)
    assert gradcheck(conditional_effective_sample_size, pair)
    assert gradgradcheck(conditional_effective_sample_size, (doubles(4), doubles(4)))


@pytest.mark.parametrize("function", STATISTICS, ids=lambda f: f.__name__)
def test_values_stay_the_kernels_and_edges_have_finite_gradients(function):
    for values in ([0.0, -INF, NAN, 2.0], [INF, 0.0, INF], [-INF, -INF], [NAN], [1e30, -1e30]):
        x = torch.tensor(values)
        y = x.clone().requires_grad_()
        result = function(y)
        torch.testing.assert_close(result.detach(), function(x), rtol=0, atol=0, equal_nan=True)
        result.backward(torch.ones_like(result))
        assert y.grad.isfinite().all()
        assert (y.grad[~x.isfinite()] == 0).all()


def test_edges_of_the_conditional_size():
    a = torch.tensor([0.0, -INF, NAN, 2.0, 1.0], requires_grad=True)
    b = torch.tensor([1.0, 5.0, 0.0, -INF, NAN], requires_grad=True)
    conditional_effective_sample_size(a, b).backward()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


def test_half_precision_receives_its_own_dtype():
    x = torch.randn(9, dtype=torch.bfloat16).requires_grad_()
    for function in STATISTICS:
        function(x).sum().backward()
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("masked", [False, True])
def test_log_z_has_the_normalised_weights(masked):
    x = doubles(3, 6)
    mask = torch.rand(3, 6) < 0.6 if masked else None
    if masked:
        mask[:, 0] = True
    result = resample(x, mask=mask, seed=1)
    (gradient,) = torch.autograd.grad(result.log_z.sum(), x)
    live = x.detach() if mask is None else x.detach().masked_fill(~mask, -INF)
    torch.testing.assert_close(gradient, live.softmax(-1))
    assert gradcheck(lambda x: resample(x, mask=mask, seed=1).log_z, x)
    assert not any(
        tensor.requires_grad
        for tensor in (result.ancestors, result.offspring, result.ess, result.resampled)
    )


def test_a_carried_weight_is_the_old_one():
    x = torch.tensor([[0.0, 0.1, -0.1], [9.0, 0.0, -9.0]]).requires_grad_()
    result = resample(x, ess_threshold=0.5, seed=0)
    assert result.resampled.tolist() == [False, True]
    cotangent = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    (gradient,) = torch.autograd.grad((result.log_weights * cotangent).sum() + result.log_z[0], x)
    assert torch.equal(gradient, cotangent)


def test_finished_weights_are_lowered_by_log_z():
    x = doubles(5)
    mask = torch.tensor([True, False, True, True, False])
    result = resample(x, mask=mask, seed=3)
    (gradient,) = torch.autograd.grad(result.log_weights[1], x)
    expected = -x.detach().masked_fill(~mask, -INF).softmax(-1)
    expected[1] += 1
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "scheme", ["multinomial", "systematic", "stratified", "residual", "ssp", "optimal"]
)
def test_values_are_those_without_gradient(scheme):
    x = torch.randn(4, 9)
    options = {"scheme": scheme, "num_samples": 5, "seed": 4}
    for a, b in zip(
        resample(x, **options), resample(x.clone().requires_grad_(), **options), strict=True
    ):
        assert torch.equal(a, b)


def test_the_choice_carries_an_unbiased_gradient():
    """Two steps of a tiny filter: summed over every outcome, the gradient is that of Z itself.

    The outcomes of two multinomial slots are enumerated, each with its probability as a number.
    """
    first, second = doubles(3), doubles(3)
    z = torch.exp(first + second).mean()  # what one step with both weights has
    expected = torch.autograd.grad(z, (first, second))
    shares = first.detach().softmax(0)
    edges = torch.cat([torch.zeros(1), shares.cumsum(0)])
    middles = (edges[1:] + edges[:-1]) / 2
    estimate = torch.zeros((), dtype=torch.float64)
    for slots in itertools.product(range(3), repeat=2):
        chosen = torch.tensor(slots)
        uniforms = middles[chosen]
        result = resample(first, scheme="multinomial", num_samples=2, uniforms=uniforms)
        assert torch.equal(result.ancestors, chosen)
        carried = result.log_weights + second[result.ancestors]
        estimate = estimate + shares[chosen].prod() * (result.log_z + log_mean_exp(carried)).exp()
    torch.testing.assert_close(estimate, z)
    for gradient, exact in zip(
        torch.autograd.grad(estimate, (first, second)), expected, strict=True
    ):
        torch.testing.assert_close(gradient, exact)


def test_detached_new_weights_are_the_usual_gradient():
    x = doubles(2, 6)
    result = resample(x, seed=2)
    assert result.log_weights.requires_grad
    assert (result.log_weights == 0).all()
    with torch.no_grad():
        assert not resample(x, seed=2).log_z.requires_grad
        assert not effective_sample_size(x).requires_grad


def test_compiled():
    def loss(x):
        result = resample(x, seed=7, ess_threshold=0.9)
        return (
            result.log_z.sum()
            + (result.log_weights * torch.arange(6)).sum()
            + effective_sample_size(x).sum()
            + weight_entropy(x).sum()
            + conditional_effective_sample_size(x, x / 2).sum()
        )

    x = torch.randn(3, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(x), x)
    (gradient,) = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x
    )
    torch.testing.assert_close(gradient, expected)

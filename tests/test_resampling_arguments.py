"""What resample accepts as arguments, and what it says of others."""

from __future__ import annotations

import numpy
import pytest
import torch

from torch_winnow import reference
from torch_winnow.resampling import resample


@pytest.mark.filterwarnings("error")
def test_decisions_take_weights_as_numbers():
    log_weights = torch.randn(3, 8, requires_grad=True)
    uniforms = torch.rand(3, requires_grad=True)
    for options in ({"seed": 0}, {"uniforms": uniforms}):
        result = resample(log_weights, **options)
        differentiable = [name for name, x in result._asdict().items() if x.requires_grad]
        assert differentiable == ["log_weights", "log_z"]
        expected = reference.resample(log_weights.detach(), **options)
        assert torch.equal(result.ancestors, expected.ancestors)


def test_seeds():
    log_weights = torch.randn(3, 8)
    expected = resample(log_weights, seed=5)
    for seed in (numpy.int64(5), numpy.uint8(5), torch.tensor(5)):
        assert torch.equal(resample(log_weights, seed=seed).ancestors, expected.ancestors)
    compiled = torch.compile(lambda x, seed: resample(x, seed=seed), fullgraph=True)
    for seed in (5, torch.tensor(5)):
        assert torch.equal(compiled(log_weights, seed).ancestors, expected.ancestors)
    for seed, got in ((1.5, "float"), ("1", "str"), (numpy.float32(1), "float32")):
        with pytest.raises(ValueError, match=f"seed: expected an int or .*got {got}"):
            resample(log_weights, seed=seed)
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="seed: expected a number of 64 bits"):
            resample(log_weights, seed=seed)
    for seed in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match="seed: expected either a seed or a generator"):
            resample(log_weights, seed=seed, generator=torch.Generator())


def test_arguments_are_tensors():
    weights = torch.zeros(3)
    with pytest.raises(ValueError, match="log_weights: expected a floating tensor .*got ndarray"):
        resample(numpy.zeros(3))
    with pytest.raises(ValueError, match="mask: expected a bool tensor .*got list"):
        resample(weights, mask=[True, True, False])
    with pytest.raises(ValueError, match="uniforms: expected a float32 or float64 tensor.*float"):
        resample(weights, uniforms=0.5)

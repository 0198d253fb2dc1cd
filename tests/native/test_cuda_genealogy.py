"""Tracing ancestors and keyed uniforms on the GPU: the numbers of the CPU."""

from __future__ import annotations

import pytest
import torch

from torch_winnow.resampling import trace_ancestors


@pytest.mark.parametrize("shape", [(4, 7), (1, 1), (5, 2, 3, 6), (0, 4), (3, 0, 5), (2, 300)])
def test_traces(gpu, shape):
    ancestors = torch.randint(shape[-1], shape)
    indices = torch.randint(shape[-1], (*shape[1:-1], 3))
    lines = [indices]
    for parents in ancestors.flip(0):
        lines.append(parents.gather(-1, lines[-1]))
    result = trace_ancestors(ancestors.to(gpu), indices.to(gpu))
    assert torch.equal(result.cpu(), torch.stack(lines[::-1]))


def test_a_path_that_leaves_its_population_ends(gpu):
    ancestors = torch.tensor([[0, 1, 2], [1, 7, -3]], device=gpu)
    assert trace_ancestors(ancestors).tolist() == [[1, -1, -1], [1, -1, -1], [0, 1, 2]]


def test_uniforms(gpu):
    seed = torch.tensor(-5, device=gpu)
    result = torch.ops.winnow.uniforms(seed, 3, 200)
    assert result.shape == (3, 200)
    assert ((result >= 0) & (result < 1)).all()
    fewer = torch.ops.winnow.uniforms(seed, 2, 100)
    assert torch.equal(fewer, result[:2, :100])  # keyed by row and place
    assert result.unique().numel() == 600

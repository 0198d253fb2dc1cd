"""Moving particles on the GPU, into new memory and in place."""

from __future__ import annotations

import pytest
import torch

from torch_winnow.resampling import gather_particles, gather_particles_

# Units of 1, 2, 4, 8 and 16 bytes.
DTYPES = (torch.bool, torch.int8, torch.bfloat16, torch.float32, torch.int64, torch.complex128)


def expected(state, ancestors, dim):
    """Populations are the dimensions before `dim`."""
    flat = state.movedim(dim, 0) if ancestors.dim() == 1 else state
    if ancestors.dim() == 1:
        return flat[ancestors].movedim(0, dim)
    return torch.stack([row[index] for row, index in zip(state, ancestors, strict=True)])


def values(gpu, dtype, *shape):
    return (torch.randn(shape) * 40).to(gpu).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [(), (3,), (64,), (5, 700)], ids=str)
def test_new_memory_and_in_place(gpu, dtype, row):
    state = values(gpu, dtype, 2, 9, *row)
    ancestors = torch.randint(0, 9, (2, 9), device=gpu)
    result = expected(state, ancestors, 1)
    assert torch.equal(gather_particles(state, ancestors, dim=1), result)
    gather_particles_(state, ancestors, dim=1)
    assert torch.equal(state, result)


def test_more_or_fewer_samples(gpu):
    state = values(gpu, torch.float32, 5, 7)
    for samples in (1, 12):
        ancestors = torch.randint(0, 5, (samples,), device=gpu)
        assert torch.equal(gather_particles(state, ancestors, dim=0), state[ancestors])


@pytest.mark.parametrize("particles", [2, 400, 4000, 30_000])
def test_cycles(gpu, particles):
    state = values(gpu, torch.int64, particles, 2)
    ancestors = torch.roll(torch.arange(particles, device=gpu), 1)
    result = state[ancestors]
    gather_particles_(state, ancestors, dim=0)
    assert torch.equal(state, result)


def test_inner_particle_dimension_and_strides(gpu):
    ancestors = torch.tensor([2, 2, 0, 3], device=gpu)
    state = values(gpu, torch.bfloat16, 3, 4, 40)
    assert torch.equal(gather_particles(state, ancestors, dim=1), state[:, ancestors])
    base = values(gpu, torch.float32, 4, 10, 6)
    view = base[:, 1:8:2].transpose(1, 2)
    result = view[ancestors]
    rest = base[:, 0].clone()
    assert torch.equal(gather_particles(view, ancestors, dim=0), result)
    gather_particles_(view, ancestors, dim=0)
    assert torch.equal(view, result)
    assert torch.equal(base[:, 0], rest)


def test_the_state_may_be_the_ancestors(gpu):
    ancestors = torch.tensor([1, 2, 0, 0], device=gpu)
    result = ancestors[ancestors]
    gather_particles_(ancestors, ancestors, dim=0)
    assert torch.equal(ancestors, result)


def test_any_order_gives_the_same(gpu, on_every_order):
    state = values(gpu, torch.float32, 2, 50, 30)
    ancestors = torch.randint(0, 50, (2, 50), device=gpu)

    def moved():
        copy = state.clone()
        gather_particles_(copy, ancestors, dim=1)
        return copy

    results = on_every_order(moved)
    assert all(torch.equal(result, results[0]) for result in results)


def test_foreign_ancestors_touch_nothing(gpu):
    state = values(gpu, torch.float32, 4, 5)
    before = state.clone()
    gather_particles_(state, torch.tensor([0, -1, 9, 1], device=gpu), dim=0)
    assert torch.equal(state[:3], before[:3])
    assert torch.equal(state[3], before[1])


def test_empty_and_errors(gpu):
    none = torch.zeros(0, dtype=torch.int64, device=gpu)
    assert gather_particles(torch.zeros(3, 0, device=gpu), none, dim=1).shape == (3, 0)
    with pytest.raises(ValueError, match="ancestors: expected int64"):
        gather_particles(torch.zeros(3, device=gpu), none.float(), dim=0)
    with pytest.raises(ValueError, match="expected one per particle"):
        gather_particles_(torch.zeros(3, device=gpu), none, dim=0)

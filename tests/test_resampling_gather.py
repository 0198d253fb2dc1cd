"""gather_particles and its in-place form against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_winnow import reference
from torch_winnow.resampling import gather_particles, gather_particles_, resample

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.bool,
    torch.complex128,
)


def numbers(shape, dtype):
    return torch.randint(-100, 100, shape).to(dtype)


def check_both(state, ancestors, dim=None):
    expected = reference.gather_particles(state, ancestors, dim)
    assert torch.equal(gather_particles(state, ancestors, dim), expected)
    if expected.shape == state.shape:
        gather_particles_(state, ancestors, dim)
        assert torch.equal(state, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_definition(dtype, device):
    for shape, populations, dim in [
        ((5,), (), None),
        ((5, 3), (), None),
        ((5, 1, 7), (), 0),
        ((2, 5, 7), (), 1),
        ((2, 7, 5), (), -1),
        ((3, 5), (3,), None),
        ((3, 5, 2, 4), (3,), None),
        ((2, 3, 5, 4), (2, 3), None),
        ((4, 2, 3, 5, 4), (2, 3), 3),
        ((4, 3, 5), (3,), -1),
        ((0, 5), (0,), None),
        ((5, 0), (), None),
    ]:
        for samples in (5, 5, 5, 9, 0):
            ancestors = torch.randint(5, (*populations, samples), device=device)
            check_both(numbers(shape, dtype).to(device), ancestors, dim)


def test_strided_states():
    ancestors = torch.randint(6, (2, 6))
    base = numbers((2, 6, 8, 10), torch.float32)
    for view in (
        base[..., ::2],
        base[:, :, 1:5, 2:7],
        base.transpose(2, 3),
        base.transpose(0, 1).contiguous().transpose(0, 1),
        base.permute(0, 1, 3, 2)[..., ::3],
        base.flip(3).permute(3, 2, 0, 1).contiguous().permute(2, 3, 0, 1),
    ):
        check_both(view, ancestors)
    # Writing to a view leaves the rest of its base alone.
    whole = base.clone()
    part = whole[:, :, :, 2:5]
    expected = whole.clone()
    expected[:, :, :, 2:5] = reference.gather_particles(part, ancestors)
    gather_particles_(part, ancestors)
    assert torch.equal(whole, expected)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=9, max_size=9))
def test_in_place_is_right_for_any_ancestors(ancestors):
    """Chains that hang on cycles, fans and fixed points, whatever their order."""
    check_both(torch.arange(27).reshape(9, 3), torch.tensor(ancestors))


def test_in_place_permutations_and_chains():
    for particles in (2, 3, 17, 500):
        index = torch.arange(particles)
        for ancestors in (
            index.roll(1),
            index.flip(0),
            torch.randperm(particles),
            (index + 1).clamp(max=particles - 1),
            (index - 1).clamp(min=0),
            index // 2,
            torch.zeros_like(index),
        ):
            check_both(numbers((particles, 5), torch.float32), ancestors)


def test_rows_beyond_a_chunk(on_thread_counts):
    """Rows of 200 KB are cut; every chunk moves alike, on any number of threads."""
    state = torch.randn(2, 6, 3, 17_001)
    ancestors = torch.stack([torch.tensor([1, 2, 0, 3, 3, 4]), torch.randint(6, (6,))])
    expected = reference.gather_particles(state, ancestors)
    moved = on_thread_counts(lambda: gather_particles_(state.clone(), ancestors))
    moved += on_thread_counts(lambda: gather_particles(state, ancestors))
    assert all(torch.equal(result, expected) for result in moved)


def test_many_populations():
    state = torch.randn(3000, 4, 2)
    result = resample(torch.randn(3000, 4), seed=0, keep_slots=True)
    check_both(state, result.ancestors)


def test_trees():
    ancestors = torch.tensor([2, 0, 0])
    tree = {"cache": [torch.arange(3), (torch.arange(6).view(3, 2), None)], "step": 7, "name": "x"}
    moved = gather_particles(tree, ancestors)
    assert moved["step"] == 7
    assert moved["cache"][1][1] is None
    assert torch.equal(moved["cache"][0], ancestors)
    assert torch.equal(moved["cache"][1][0], torch.tensor([[4, 5], [0, 1], [0, 1]]))
    assert torch.equal(tree["cache"][0], torch.arange(3))
    assert gather_particles_(tree, ancestors) is tree
    assert torch.equal(tree["cache"][0], ancestors)
    # The genealogy may be a leaf of the state.
    lineage = ancestors.clone()
    gather_particles_([lineage, lineage.new_zeros(3)], lineage)
    assert torch.equal(lineage, torch.tensor([0, 2, 2]))


def test_gradients():
    ancestors = torch.tensor([[1, 1, 0], [2, 0, 2]])
    state = torch.randn(4, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_particles(x, ancestors, 2), (state,))
    assert torch.equal(
        gather_particles(state, ancestors, 2).detach(),
        reference.gather_particles(state.detach(), ancestors, 2),
    )
    with pytest.raises(ValueError, match=r"do not require grad to gather in place.*\(4, 2, 3, 5\)"):
        gather_particles_(state, ancestors, 2)
    with torch.no_grad():
        gather_particles_(state, ancestors, 2)


def test_gradients_of_strided_states():
    for shape, populations, samples, dim in [
        ((5,), (), 7, 0),
        ((5, 2), (), 0, 0),
        ((2, 5), (), 3, -1),
        ((2, 3, 4), (2, 3), 4, -1),
        ((0, 4), (0,), 4, 1),
    ]:
        ancestors = torch.randint(shape[dim], (*populations, samples))
        state = torch.randn(*shape, 2, dtype=torch.float64)[..., 0].requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, a=ancestors, d=dim: gather_particles(x, a, d), state
        )
        assert torch.autograd.gradgradcheck(
            lambda x, a=ancestors, d=dim: gather_particles(x, a, d) ** 2, state
        )


def test_gradients_are_bitwise_equal_on_any_number_of_threads(on_thread_counts):
    state = torch.randn(2, 50, 3000, requires_grad=True)
    ancestors, grad = torch.randint(5, (2, 50)), torch.randn(2, 50, 3000)

    def gradient():
        return torch.autograd.grad(gather_particles(state, ancestors), state, grad)[0]

    results = on_thread_counts(gradient)
    assert all(torch.equal(result, results[0]) for result in results)


def test_gradients_compiled():
    ancestors = torch.tensor([[1, 1, 0], [2, 0, 2]])
    state = torch.randn(2, 3, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.winnow.gather_particles.default, (state, ancestors, 1))
    weight = torch.randn(2, 3, 4)
    (expected,) = torch.autograd.grad((gather_particles(state, ancestors) * weight).sum(), state)
    compiled = torch.compile(gather_particles, fullgraph=True)
    (result,) = torch.autograd.grad((compiled(state, ancestors) * weight).sum(), state)
    torch.testing.assert_close(result, expected)


def test_opcheck_and_compile():
    state, ancestors = torch.randn(2, 3, 4), torch.tensor([[1, 2, 0], [0, 0, 1]])
    torch.library.opcheck(torch.ops.winnow.gather_particles.default, (state, ancestors, 1))
    torch.library.opcheck(torch.ops.winnow.gather_particles_.default, (state, ancestors, 1))
    expected = reference.gather_particles(state, ancestors)

    @torch.compile(fullgraph=True)
    def both(state, tree, ancestors):
        gather_particles_(tree, ancestors)
        return gather_particles(state, ancestors)

    tree = {"x": state.clone(), "y": [ancestors.clone()]}
    assert torch.equal(both(state, tree, ancestors), expected)
    assert torch.equal(tree["x"], expected)
    assert torch.equal(tree["y"][0], reference.gather_particles(ancestors, ancestors))


@pytest.mark.parametrize("gather", [gather_particles, gather_particles_])
@pytest.mark.parametrize("ancestors", [[0, 1], (0, 1), 0, None])
def test_ancestors_are_a_tensor(gather, ancestors):
    for tree in (torch.zeros(2), [torch.zeros(2)]):
        with pytest.raises(ValueError, match=r"ancestors: expected an int64 tensor .*, got "):
            gather(tree, ancestors)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("gather", [gather_particles, gather_particles_])
@pytest.mark.parametrize(
    ("state", "ancestors", "dim", "message"),
    [
        (torch.zeros(3), torch.tensor([0, 3, 0]), None, r"ancestors: expected .* \[0, 3\), got 3"),
        (torch.zeros(3), torch.tensor([0, -1, 0]), None, r"ancestors: .*got -1"),
        (torch.zeros(3), torch.zeros(3), None, "ancestors: expected int64, got float32"),
        (torch.zeros(3), torch.tensor(0), 0, "ancestors: .*got a scalar"),
        (torch.zeros(()), torch.zeros(3).long(), None, "dim: expected a dimension of state"),
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), 0, "dim: expected .* got 0"),
        (torch.zeros(4, 3), torch.zeros(2, 3).long(), None, r"state: expected the pop.*4, 3"),
    ],
)
def test_errors_name_the_argument(gather, state, ancestors, dim, message, requires_grad):
    if requires_grad:
        if gather is gather_particles_:
            message = "do not require grad"
        state = state.clone().requires_grad_()
    with pytest.raises(ValueError, match=message):
        gather(state, ancestors, dim)


def test_errors_in_place():
    with pytest.raises(ValueError, match=r"ancestors: expected one per particle \(3\).*\(2,\)"):
        gather_particles_(torch.zeros(3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"tree: expected memory of its own.*\(3,\) .* \(0,\)"):
        gather_particles_(torch.zeros(1).expand(3), torch.tensor([0, 1, 1]))
    overlapping = torch.arange(6.0).as_strided((4, 3), (1, 1))
    with pytest.raises(ValueError, match="elements share memory"):
        gather_particles_(overlapping, torch.tensor([0, 0, 1, 2]))
    assert torch.equal(overlapping[0], torch.arange(3.0))


@pytest.mark.parametrize("gather", [gather_particles, gather_particles_])
def test_dim_is_an_int(gather):
    for tree in (torch.zeros(3), [torch.zeros(3)]):
        with pytest.raises(ValueError, match="dim: expected an integer, got"):
            gather(tree, torch.arange(3), dim=0.0)

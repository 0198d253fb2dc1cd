"""gather_particles_ on trees whose leaves share memory, and what autograd knows of its moves."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_winnow import reference
from torch_winnow._resampling.memory import first_overlap, overlaps_itself
from torch_winnow.resampling import gather_particles, gather_particles_

ANCESTORS = torch.tensor([2, 0, 0])


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"x": x}, lambda x: [x[:]]])
def test_backward_refuses_numbers_that_have_moved(wrap):
    w = torch.ones(3, requires_grad=True)
    state = torch.tensor([1.0, 2.0, 3.0])
    y = (w * state).sum()
    gather_particles_(wrap(state), torch.tensor([2, 2, 2]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_tensors_move():
    with torch.inference_mode():
        state = torch.arange(3)
        assert torch.equal(gather_particles_(state, ANCESTORS), ANCESTORS)


def test_ancestors_among_the_leaves():
    for view in (lambda a: a, lambda a: a[:], lambda a: a.view(3, 1)):
        lineage = ANCESTORS.clone()
        x, y = torch.arange(3), torch.arange(6).view(3, 2)
        gather_particles_([view(lineage), x, {"y": y}], lineage)
        assert torch.equal(lineage, ANCESTORS[ANCESTORS])
        assert torch.equal(x, ANCESTORS)
        assert torch.equal(y[:, 0], 2 * ANCESTORS)


def test_a_tensor_twice_moves_once():
    for again in (lambda x: x, lambda x: x[:], lambda x: x.detach()):
        x = torch.tensor([5, 6, 7])
        tree = {"a": x, "b": [again(x)]}
        assert gather_particles_(tree, torch.tensor([1, 2, 0])) is tree
        assert torch.equal(x, torch.tensor([6, 7, 5]))


def test_slices_of_one_tensor():
    """Keys and values of a cache lie in one tensor, one way or another."""
    for dim in range(1, 4):
        cache = torch.randn(3, 4, 4, 6)
        expected = gather_particles(cache, ANCESTORS)
        gather_particles_(list(cache.chunk(2, dim)), ANCESTORS)
        assert torch.equal(cache, expected)
    layers = torch.randn(4, 3, 5)
    expected = gather_particles(layers, ANCESTORS, 1)
    gather_particles_(list(layers), ANCESTORS)
    assert torch.equal(layers, expected)
    even, odd = torch.randn(3, 8), None
    expected = gather_particles(even, ANCESTORS)
    even, odd = even[:, ::2], even[:, 1::2]
    gather_particles_((even, odd), ANCESTORS)
    assert torch.equal(torch.stack([even, odd], -1).flatten(1), expected)


@pytest.mark.parametrize(
    "pair",
    [
        lambda b: [b, b.view(3, 3, 1)],
        lambda b: [b, b.T],
        lambda b: [b[:, :2], b[:, 1:]],
        lambda b: [b[:, 0], b],
        lambda b: [b, b.view(torch.int32)],
        lambda b: [b, b.view(torch.float32).view(3, 6)[:, :1]],
    ],
)
def test_other_shared_memory_is_refused_before_any_move(pair):
    base = torch.arange(9.0, dtype=torch.float64).view(3, 3)
    before, first = base.clone(), torch.arange(3)
    with pytest.raises(ValueError, match=r"tree: expected leaves that do not share memory.*\(3"):
        gather_particles_([first, *pair(base)], ANCESTORS)
    assert torch.equal(base, before)
    assert torch.equal(first, torch.arange(3))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.zeros(4), r"ancestors: expected one per particle \(4\)"),
        (torch.zeros(()), "dim: expected a dimension of state"),
        (torch.zeros(3, requires_grad=True), "tree: expected tensors that do not require grad"),
        (torch.zeros(1).expand(3), "tree: expected memory of its own"),
        (torch.zeros(6).as_strided((3, 3), (1, 1)), r"tree: .*own.*\(3, 3\) with strides \(1, 1\)"),
        (torch.zeros(3).to_sparse(), "tree: expected strided tensors"),
    ],
)
def test_a_tree_moves_whole_or_not_at_all(bad, error):
    x, y = torch.arange(3), torch.arange(3)
    with pytest.raises(ValueError, match=error):
        gather_particles_({"x": x, "bad": bad, "y": y}, ANCESTORS)
    assert torch.equal(x, torch.arange(3))
    assert torch.equal(y, torch.arange(3))


def test_lazily_conjugated_and_negated_leaves():
    base = torch.randn(3, 4, dtype=torch.complex64)
    for view in (
        lambda x: x.conj(),
        lambda x: x.conj().imag,
        lambda x: x.conj()[:, ::2],
        lambda x: x.conj().T.conj().T,
    ):
        state = base.clone()
        leaf = view(state)
        expected = reference.gather_particles(leaf, ANCESTORS)
        assert torch.equal(gather_particles(leaf, ANCESTORS), expected)
        assert gather_particles_(leaf, ANCESTORS) is leaf
        assert torch.equal(leaf, expected)
        assert torch.equal(view(state), expected)
        with pytest.raises(ValueError, match="ancestors: expected one per particle"):
            gather_particles_(leaf, torch.tensor([0]))


def test_compiled_trees():
    @torch.compile(fullgraph=True)
    def move(tree, ancestors):
        gather_particles_(tree, ancestors)
        return tree["x"] + 1

    lineage, x = ANCESTORS.clone(), torch.arange(3)
    moved = move({"lineage": lineage, "x": x, "again": x}, lineage)
    assert torch.equal(x, ANCESTORS)
    assert torch.equal(moved, ANCESTORS + 1)
    assert torch.equal(lineage, ANCESTORS[ANCESTORS])


views = st.builds(
    lambda sizes, strides, offset: (sizes, strides, offset),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
    st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=3, max_size=3),
    st.integers(0, 20),
)


@settings(max_examples=1000, deadline=None)
@given(views, views)
def test_no_overlap_is_overlooked(a, b):
    memory = torch.zeros(150)
    one, other = (memory.as_strided(*view) for view in (a, b))
    touched = []
    for sizes, strides, offset in (a, b):
        steps = itertools.product(*map(range, sizes))
        touched.append(
            [offset + sum(i * s for i, s in zip(at, strides, strict=True)) for at in steps]
        )
    doubled = [len(set(addresses)) < len(addresses) for addresses in touched]
    for view, really in zip((one, other), doubled, strict=True):
        assert overlaps_itself(view) or not really
    if not overlaps_itself(one) and not overlaps_itself(other):
        meet = bool(set(touched[0]) & set(touched[1]))
        assert first_overlap([one, other]) is not None or not meet

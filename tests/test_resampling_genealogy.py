"""Tracing ancestors, and drawing paths backwards."""

from __future__ import annotations

import pytest
import torch

from torch_winnow import reference
from torch_winnow.resampling import (
    Genealogy,
    backward_sample,
    gather_particles,
    resample,
    trace_ancestors,
)


@pytest.mark.parametrize("shape", [(4, 7), (1, 1), (5, 2, 3, 6), (0, 4), (3, 0, 5), (3, 2, 0)])
def test_traces_match_the_definition(shape, on_thread_counts):
    ancestors = torch.randint(max(shape[-1], 1), shape)
    results = on_thread_counts(lambda: trace_ancestors(ancestors))
    assert all(torch.equal(result, reference.trace_ancestors(ancestors)) for result in results)
    some = torch.randint(max(shape[-1], 1), (*shape[1:-1], 3 if shape[-1] else 0))
    assert torch.equal(trace_ancestors(ancestors, some), reference.trace_ancestors(ancestors, some))


def test_strided_opcheck_and_compile():
    ancestors = torch.randint(5, (6, 2, 5))
    view = ancestors.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(trace_ancestors(view), trace_ancestors(ancestors))
    op = torch.ops.winnow.trace_ancestors.default
    torch.library.opcheck(op, (ancestors, torch.randint(5, (2, 3))))
    torch.library.opcheck(torch.ops.winnow.uniforms.default, (torch.tensor(3), 4, 5))
    compiled = torch.compile(trace_ancestors, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ancestors), trace_ancestors(ancestors))


def test_a_genealogy_gathers_what_ancestors_held():
    x = torch.randn(2, 6, 3)
    genealogy = Genealogy({"x": x, "name": "kept"})
    history, paths = [x], [x]
    for step in range(4):
        ancestors = resample(torch.randn(2, 6), seed=step).ancestors
        x = torch.randn(2, 6, 3)
        genealogy.append(ancestors, {"x": x, "name": "kept"})
        history.append(x)
        paths = [gather_particles(line, ancestors) for line in paths] + [x]
    gathered = genealogy.paths()
    assert all(torch.equal(a["x"], b) for a, b in zip(gathered, paths, strict=True))
    assert gathered[0]["name"] == "kept"
    one = genealogy.paths(torch.tensor([[4], [0]]))
    assert torch.equal(one[2]["x"][1, 0], paths[2][1, 0])
    assert genealogy.trace().shape == (5, 2, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trace_ancestors([[0]]), "ancestors: expected an int64 tensor .*got list"),
        (
            lambda: trace_ancestors(torch.zeros(3).long()),
            r"ancestors: .*\(T, ..., K\), got .*\(3,\)",
        ),
        (lambda: trace_ancestors(torch.zeros(2, 3)), "ancestors: expected int64, got float32"),
        (lambda: trace_ancestors(torch.full((2, 3), 3)), r"ancestors: .*\[0, 3\), got 3"),
        (lambda: trace_ancestors(torch.full((2, 3), -1)), r"ancestors: .*\[0, 3\), got -1"),
        (
            lambda: trace_ancestors(torch.zeros(2, 3).long(), torch.tensor([5])),
            r"indices: .*\[0, 3\), got 5",
        ),
        (
            lambda: trace_ancestors(torch.zeros(2, 4, 3).long(), torch.tensor([0])),
            r"indices: expected \(..., M\) .*\(2, 4, 3\), got shape \(1,\)",
        ),
        (lambda: Genealogy().trace(), "ancestors: expected a recorded step"),
        (lambda: Genealogy().append(torch.zeros(3)), "ancestors: .*got torch.float32"),
        (lambda: Genealogy().append([0, 1]), "ancestors: .*got list"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_generations_have_one_size():
    genealogy = Genealogy()
    genealogy.append(torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"earlier steps \(2,\), got \(3,\)"):
        genealogy.append(torch.tensor([0, 0, 1]))


def transition(x, y, sd=1.0):
    def log_transition(i, j):
        return (
            -0.5
            * ((y.gather(-1, j.flatten(-2)) - x.gather(-1, i.flatten(-2))) / sd).reshape(i.shape)
            ** 2
        )

    return log_transition


@pytest.mark.parametrize("log_bound", [None, 0.0, 1.5], ids=["exact", "tight bound", "loose bound"])
def test_backward_draws_have_their_law(log_bound):
    """Frequencies of 40 000 draws for each of three successors, within 4.5 standard errors."""
    log_weights = torch.tensor([0.0, 1.0, -1.0, -torch.inf, 0.5], dtype=torch.float64)
    x = torch.tensor([-2.0, 0.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    y = torch.tensor([-1.0, 1.2, 6.0], dtype=torch.float64)
    draws = 40_000
    successors = torch.arange(3).repeat_interleave(draws)
    # At 6 proposals are mostly refused: a few tries leave some for the exact draw.
    parents = backward_sample(
        log_weights, transition(x, y), successors, log_bound=log_bound, max_tries=3, seed=9
    ).reshape(3, draws)
    for j in range(3):
        law = (log_weights - 0.5 * (y[j] - x) ** 2).softmax(0)
        seen = torch.bincount(parents[j], minlength=5) / draws
        assert ((seen - law).abs() <= 4.5 * (law * (1 - law) / draws).sqrt()).all()
        assert seen[3] == 0


def test_the_definition_has_the_law_too():
    log_weights, x, y = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.8])
    parents = reference.backward_sample(
        log_weights, transition(x, y), torch.zeros(20_000, dtype=torch.int64), seed=0
    )
    law = (log_weights - 0.5 * (y - x) ** 2).softmax(0)
    assert abs(parents.double().mean().item() - law[1].item()) < 4.5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("log_bound", [None, 0.0])
def test_a_population_is_alone(log_bound):
    log_weights, x, y = torch.randn(3, 2, 4, 30)
    options = {"log_bound": log_bound, "max_tries": 2, "seed": 3}
    parents = backward_sample(log_weights, transition(x, y, 0.1), **options)
    assert parents.shape == (2, 4, 30)
    w, a, b = (t.clone() for t in (log_weights, x, y))
    for t in (w, a, b):
        t[0] = torch.randn(4, 30)
        t[0, 0] *= 100  # long waits elsewhere
    other = backward_sample(w, transition(a, b, 0.1), **options)
    assert torch.equal(other[1], parents[1])


def test_backward_edges():
    nobody = torch.full((3,), -torch.inf)
    for log_bound in (None, 0.0):
        options = {"log_bound": log_bound, "seed": 0}
        flat = lambda i, j: torch.zeros(i.shape)  # noqa: E731
        assert backward_sample(nobody, flat, **options).max() < 3
        never = lambda i, j: torch.full(i.shape, -torch.inf)  # noqa: E731
        assert backward_sample(torch.zeros(3), never, **options).max() < 3
        empty = torch.empty(0, dtype=torch.int64)
        assert backward_sample(torch.zeros(3), flat, empty, **options).shape == (0,)
    generator = torch.Generator().manual_seed(1)
    assert backward_sample(torch.zeros(3), flat, generator=generator).shape == (3,)
    with pytest.raises(ValueError, match="log_transition: expected a function, got int"):
        backward_sample(torch.zeros(3), 3)
    with pytest.raises(ValueError, match=r"log_transition: .*shape \(3, 3\), got \(3,\)"):
        backward_sample(torch.zeros(3), lambda i, j: torch.zeros(3), seed=0)
    with pytest.raises(ValueError, match=r"successors: expected int64 .*got torch.float32"):
        backward_sample(torch.zeros(3), flat, torch.zeros(3))
    with pytest.raises(ValueError, match=r"successors: expected int64 .*got .* of shape \(\)"):
        backward_sample(torch.zeros(3), flat, torch.tensor(0))
    with pytest.raises(ValueError, match=r"log_weights: expected \(\.\.\., K\), got a scalar"):
        backward_sample(torch.tensor(0.0), flat)
    with pytest.raises(ValueError, match=r"log_weights: expected at least one particle"):
        backward_sample(torch.zeros(0), flat, torch.zeros(2, dtype=torch.int64))
    assert backward_sample(torch.zeros(2, 0), flat).shape == (2, 0)
    for options, message in (
        ({"log_bound": "high"}, "log_bound: expected a number, got 'high'"),
        ({"log_bound": float("nan")}, "log_bound: expected a number, got nan"),
        ({"log_bound": 0.0, "max_tries": -1}, "max_tries: expected at least 0, got -1"),
        ({"log_bound": 0.0, "max_tries": 1.5}, "max_tries: expected an integer, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            backward_sample(torch.zeros(3), flat, **options)


def test_smoothing_a_hidden_markov_model():
    """Means of drawn paths against forward-backward, within 5 standard errors; traces agree too."""
    generator = torch.Generator().manual_seed(4)
    states, steps, particles = 3, 6, 20_000
    move = torch.rand(states, states, generator=generator).double() + 0.1
    move /= move.sum(-1, keepdim=True)
    seen = torch.rand(steps, states, generator=generator).double().log()  # log p(y_t | x)
    forward = [seen[0].exp() / states]
    for t in range(1, steps):
        forward.append((forward[-1] @ move) * seen[t].exp())
    backward = [torch.ones(states, dtype=torch.float64)]
    for t in range(steps - 1, 0, -1):
        backward.append(move @ (seen[t].exp() * backward[-1]))
    exact = torch.stack(forward) * torch.stack(backward[::-1])
    exact /= exact.sum(-1, keepdim=True)

    x = torch.randint(states, (particles,), generator=generator)
    history, weights = [x], [seen[0][x]]
    genealogy = Genealogy(x)
    log_z = 0.0
    for t in range(1, steps):
        result = resample(weights[-1], seed=t)
        log_z += result.log_z
        x = torch.multinomial(move[x[result.ancestors]], 1, generator=generator).squeeze(-1)
        genealogy.append(result.ancestors, x)
        history.append(x)
        weights.append(seen[t][x])
    last = resample(weights[-1], seed=steps)
    log_z += last.log_z
    assert log_z.item() == pytest.approx(forward[-1].sum().log().item(), abs=0.03)

    indices = last.ancestors[::5]
    lines = [indices]
    for t in range(steps - 2, -1, -1):

        def log_transition(i, j, t=t):
            return move.log()[history[t][i], history[t + 1][j]]

        lines.append(
            backward_sample(weights[t], log_transition, lines[-1], log_bound=0.0, seed=100 + t)
        )
    for t, line in enumerate(reversed(lines)):
        drawn = torch.bincount(history[t][line], minlength=states) / len(line)
        traced = torch.bincount(genealogy.paths(last.ancestors)[t], minlength=states) / particles
        assert (drawn - exact[t]).abs().max() < 5 * 0.5 / len(line) ** 0.5
        assert (traced - exact[t]).abs().max() < 0.05  # coarser: few ancestors are left

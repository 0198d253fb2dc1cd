"""The random rules that look back against the exact law of the process that they stand for."""

from __future__ import annotations

import itertools

import pytest
import torch

from torch_winnow import reference
from torch_winnow.unmasking import (
    Decoding,
    FirstHitting,
    Remasking,
    generate,
)


def time_model(tokens, time):
    """A distribution over two symbols that depends on the time and on the other positions."""
    known = ((tokens == 0).float() - (tokens == 1).float()).sum(1, keepdim=True)
    place = torch.arange(tokens.shape[1]) * 0.7 - 0.5
    logit = known * (0.5 + 2 * time[:, None]) + place + 3 * time[:, None] - 1
    return torch.stack([logit, torch.zeros_like(logit)], -1).double()


def law_of(length, steps, rule):
    """Probability of every state of the chain in `steps` steps, by enumeration."""
    states = list(itertools.product(range(3), repeat=length))
    index = {state: i for i, state in enumerate(states)}
    law = torch.zeros(len(states), dtype=torch.float64)
    law[index[(2,) * length]] = 1.0
    tokens = torch.tensor(states)
    for step in range(steps):
        a, s = step / steps, (step + 1) / steps
        most = 1.0 if a == 0 else min(1.0, (1 - s) / a)
        sigma = rule.eta * most if rule.schedule == "rescale" else min(rule.eta, most)
        unmask = (s - (1 - sigma) * a) / (1 - a)
        time = torch.full((len(states),), 1 - a, dtype=torch.float64)
        p = time_model(tokens, time).softmax(-1)
        after = torch.zeros_like(law)
        for i, state in enumerate(states):
            if law[i] == 0:
                continue
            choices = [
                [(0, unmask * p[i, j, 0]), (1, unmask * p[i, j, 1]), (2, 1 - unmask)]
                if symbol == 2
                else [(symbol, 1 - sigma), (2, sigma)]
                for j, symbol in enumerate(state)
            ]
            for combination in itertools.product(*choices):
                probability = law[i]
                for _, share in combination:
                    probability = probability * share
                after[index[tuple(symbol for symbol, _ in combination)]] += probability
        law = after
    return states, law


def distance(rule, length, states, law, samples=20_000, **options):
    """Chi-square of decoded sequences against a law, per degree of freedom."""
    result = generate(
        lambda tokens, context: time_model(tokens, context.time),
        torch.full((samples, length), 2),
        mask_id=2,
        rule=rule,
        seed=11,
        context=True,
        **options,
    )
    code = (result.tokens * 3 ** torch.arange(length)).sum(1)
    chi, cells = 0.0, 0
    for state, probability in zip(states, law.tolist(), strict=True):
        if 2 in state:
            assert probability < 1e-12
            continue
        seen = int((code == sum(s * 3**i for i, s in enumerate(state))).sum())
        chi += (seen - samples * probability) ** 2 / (samples * probability)
        cells += 1
    return chi / (cells - 1)


@pytest.mark.parametrize(
    "rule",
    [Remasking(4), Remasking(5, 0.3), Remasking(5, 0.6, "rescale"), Remasking(1, 0.5)],
    ids=str,
)
def test_remasking_has_the_law_of_its_chain(rule):
    # Seven degrees of freedom: chi-square / 7 exceeds 3.5 once in 1000 laws; the seed is fixed.
    states, law = law_of(3, rule.steps, rule)
    assert abs(float(law.sum()) - 1) < 1e-12
    assert distance(rule, 3, states, law) < 3.5


def test_confidence_remasks_the_least_confident():
    """The share of each written token in sigma is softmax(-p) over the written of its block."""
    # A position's symbol is certain at 0, a coin at 1; both are written at the first step or not.
    logits = torch.tensor([[[40.0, 0.0], [0.0, 0.0]]]).expand(40_000, 2, 2)
    decoding = Decoding(
        torch.full((40_000, 2), 2), mask_id=2, rule=Remasking(3, schedule="conf"), seed=3
    )
    decoding.advance(logits)
    both = (decoding.tokens != 2).all(1)
    decoding.advance(logits)
    again = (decoding.tokens[both] == 2).double().mean(0)
    # alpha goes from 1/3 to 2/3: sigma_max = 1.
    expected = torch.softmax(-torch.tensor([1.0, 0.5], dtype=torch.float64), 0)
    error = (expected * (1 - expected) / int(both.sum())).sqrt()
    assert ((again - expected).abs() < 4 * error).all()


def test_first_hitting_is_the_limit_of_many_small_steps():
    # The chain in 1000 steps is within 1e-3 of its limit, which 20000 samples cannot tell apart.
    states, law = law_of(2, 1000, Remasking(1000))
    assert distance(FirstHitting(), 2, states, law) < 5  # three degrees of freedom, once in 500
    coarse = law_of(2, 2, Remasking(2))[1]
    assert distance(FirstHitting(), 2, states, coarse) > 20  # a coarse chain is another law


def test_first_hitting_times_are_those_of_the_process():
    """The times of n positions are n ordered uniforms: the k-th largest has mean k'/(n+1)."""
    times = []

    def model(tokens, context):
        times.append(context.time.clone())
        return torch.zeros(*tokens.shape, 3)

    generate(
        model, torch.full((20_000, 3), 3), mask_id=3, rule=FirstHitting(), seed=5, context=True
    )
    means = torch.stack(times).mean(1)
    expected = torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64)
    assert ((means - expected).abs() < 4 * (0.05 / 20_000) ** 0.5).all()
    assert (torch.stack(times).diff(dim=0) <= 0).all()


def test_reference_of_the_random_rules_has_the_same_law():
    def model(tokens, context):
        return time_model(tokens, context.time)

    tokens = torch.full((400, 2), 2)
    for rule in (Remasking(4, 0.3), FirstHitting(), Remasking(3, schedule="conf")):
        options = {"mask_id": 2, "rule": rule, "seed": 1, "context": True}
        ours = generate(model, tokens.repeat(10, 1), **options).tokens
        theirs = torch.cat(
            [reference.generate(model, part, **options).tokens for part in tokens[:40].split(40)]
            + [
                reference.generate(model, tokens[:40], **{**options, "seed": seed}).tokens
                for seed in range(2, 11)
            ]
        )
        for position in range(2):
            p = (ours[:, position] == 0).double().mean()
            q = (theirs[:, position] == 0).double().mean()
            assert abs(p - q) < 4 * (0.25 / 400 + 0.25 / 4000) ** 0.5

"""Templates with spans, answer early exit, reasoning given an answer, and scores of spans."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from torch_winnow.unmasking import (
    AnswerEntropy,
    EntropyThreshold,
    Template,
    TopK,
    generate,
    score_span,
)

MASK = 3
TRANSITION = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)


def template():
    return Template([[0, 1], ("reasoning", 3), torch.tensor([2]), ("answer", 1)], mask_id=MASK)


def joint(rows):
    """Log-probability of sequences under a Markov chain with a uniform start."""
    return TRANSITION[rows[:, :-1], rows[:, 1:]].log().sum(1) - math.log(3)


def chain(tokens):
    """The exact conditionals of every position, given the tokens that are no masks."""
    states = torch.tensor(list(itertools.product(range(3), repeat=tokens.shape[1])))
    probability = joint(states).exp()
    kinds, which = tokens.unique(dim=0, return_inverse=True)
    logits = torch.empty(len(kinds), tokens.shape[1], 3, dtype=torch.float64)
    for kind, out in zip(kinds, logits, strict=True):
        known = kind != MASK
        agrees = (states[:, known] == kind[known]).all(1)
        for token in range(3):
            out[:, token] = (probability * agrees) @ (states == token).double()
    return logits.log()[which]


def test_spans():
    parts = template()
    assert parts.tokens.tolist() == [0, 1, 3, 3, 3, 2, 3]
    assert parts.spans == {"reasoning": (2, 5), "answer": (6, 7)}
    assert parts.positions("answer").nonzero()[:, 0].tolist() == [6]
    assert parts.positions("answer", "reasoning").nonzero()[:, 0].tolist() == [2, 3, 4, 6]
    assert parts.fill(answer=[0]).tolist() == [0, 1, 3, 3, 3, 2, 0]
    both = parts.fill(answer=torch.tensor([0]), reasoning=[1, 1, 2])
    assert both.tolist() == [0, 1, 1, 1, 2, 2, 0]
    assert parts.tokens[6] == MASK
    decoded = torch.arange(14).view(2, 7)
    assert parts.read(decoded, "reasoning").tolist() == [[2, 3, 4], [9, 10, 11]]
    assert Template([], mask_id=3).tokens.tolist() == []


def test_answer_early_exit_from_a_template():
    """The answer is written as soon as it is certain, and the rest of the reasoning left out."""
    parts = template()

    def model(tokens):
        logits = torch.zeros(len(tokens), 7, 3)
        logits[:, 6, 1] = (tokens[:, 2:5] != MASK).sum(1) * 8.0
        return logits

    result = generate(
        model,
        parts.tokens[None],
        mask_id=MASK,
        rule=EntropyThreshold(0.0),
        block_length=3,
        stop=AnswerEntropy(parts.positions("answer"), gamma=0.1),
    )
    assert result.calls == 2
    assert parts.read(result.tokens, "answer").tolist() == [[1]]
    assert (parts.read(result.tokens, "reasoning") == MASK).sum() == 2
    assert 0 < parts.read(result.entropies, "answer").sum() < 0.1


def test_reasoning_given_an_answer_is_drawn_from_the_posterior():
    parts = Template([[0], ("reasoning", 2), ("answer", 1)], mask_id=MASK)
    tokens = parts.fill(answer=[2]).repeat(3000, 1)
    # One token per call from an exact model: the joint law of the reasoning given both ends.
    drawn = generate(chain, tokens, mask_id=MASK, rule=TopK(1, score="random"), seed=4).tokens
    every = torch.tensor([[0, a, b, 2] for a in range(3) for b in range(3)])
    law = joint(every).softmax(0)
    seen = torch.stack([(drawn == row).all(1).double().mean() for row in every])
    # Nine cells, eight degrees of freedom: exceeded once in 1000.
    assert ((seen - law) ** 2 / law * 3000).sum() < 26.1


@pytest.mark.parametrize("rule", [None, TopK(1), TopK(1, score="margin"), TopK(1, score="random")])
def test_score_is_the_chain_rule_in_any_order(rule):
    tokens = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 1]])
    positions = torch.tensor([False, True, True, True])
    score = score_span(chain, tokens, positions, mask_id=MASK, rule=rule)
    expected = joint(tokens) + math.log(3)  # the first is given
    torch.testing.assert_close(score.log_prob.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score.log_probs.sum(1), score.log_prob)
    assert score.calls == 3
    assert (score.log_probs[:, 0] == 0).all()


def test_score_in_one_call_is_a_product():
    tokens = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 1]])
    positions = torch.tensor([[False, True, True, True], [False, False, False, True]])
    together = EntropyThreshold(math.inf)
    score = score_span(chain, tokens, positions, mask_id=MASK, rule=together)
    p = chain(tokens.masked_fill(positions, MASK)).log_softmax(-1)
    expected = p.gather(2, tokens[..., None])[..., 0].masked_fill(~positions, 0).sum(1)
    torch.testing.assert_close(score.log_prob.double(), expected, rtol=1e-5, atol=1e-5)
    assert score.calls == 1
    nothing = score_span(chain, tokens, torch.zeros(4, dtype=torch.bool), mask_id=MASK)
    assert nothing.log_prob.tolist() == [0.0, 0.0]
    assert nothing.calls == 0


def test_entropies_add_up_over_spans():
    parts = Template([[0], ("reasoning", 2), ("answer", 1)], mask_id=MASK)
    result = generate(chain, parts.tokens[None], mask_id=MASK, rule=TopK(1, score="entropy"))
    assert result.entropies[0, 0] == 0
    spans = [parts.read(result.entropies, name).sum() for name in parts.spans]
    torch.testing.assert_close(sum(spans), result.entropies.sum())


def test_a_random_order_follows_the_seed():
    torch.manual_seed(0)
    table = torch.randn(MASK + 1, 20, 20, MASK)

    def model(tokens):  # the logits of a position depend on every token
        here = torch.arange(20)
        return torch.stack([table[row, here].sum(0) for row in tokens])

    tokens = torch.randint(0, MASK, (2, 20))
    options = {"mask_id": MASK, "rule": TopK(3, score="random")}

    def score(**key):
        return score_span(model, tokens, tokens >= 0, **options, **key).log_prob.tolist()

    assert score(seed=5) == score(seed=torch.tensor(5)) != score(seed=6)
    assert score(generator=torch.Generator().manual_seed(1)) == score(
        generator=torch.Generator().manual_seed(1)
    )


def test_a_span_may_have_any_name_and_templates_compare():
    parts = Template([("self", 2)], mask_id=3)
    assert parts.fill(self=[1, 2]).tolist() == [1, 2]
    assert parts == parts
    assert len({parts, Template([("self", 2)], mask_id=3)}) == 2  # by identity: tensors don't hash


def scored(model=lambda tokens: torch.zeros(*tokens.shape, 3), token=0, positions=None, **options):
    where = torch.ones(3, dtype=torch.bool) if positions is None else positions
    return score_span(model, torch.full((1, 3), token), where, mask_id=3, **options)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: Template([("a", 0)], mask_id=3), "parts: a: expected at least 1, got 0"),
        (lambda: Template([("a", 1), ("a", 2)], 3), "parts: expected every name once, got 'a'"),
        (lambda: Template([[1.5]], mask_id=3), r"parts: expected token ids, got \[1.5\]"),
        (lambda: Template(["text"], mask_id=3), "parts: expected token ids, got 'text'"),
        (lambda: Template([("a", 1)], mask_id=2.5), "mask_id: expected an integer, got 2.5"),
        (lambda: template().fill(answer=[1, 2]), "answer: expected 1 token ids, got 2"),
        (lambda: template().fill(reason=[1]), "name: expected one of reasoning, answer, got"),
        (lambda: template().positions("x"), "name: expected one of reasoning, answer, got 'x'"),
        (lambda: template().read(torch.zeros(2, 5), "answer"), r"tokens: expected \(..., 7\), got"),
        (
            lambda: score_span(chain, torch.zeros(1, 3).long(), torch.ones(2) > 0, mask_id=3),
            r"positions: expected \(1, 3\) or \(3,\) bool, got \(2,\)",
        ),
        (lambda: Template(None, mask_id=3), "parts: expected a list of token ids and spans, got"),
        (lambda: scored(positions=[True]), r"positions: expected a tensor, got \[True\]"),
        (lambda: scored(token=-2), r"tokens: expected ids in \[0, 3\) at positions, got -2"),
        (lambda: scored(token=7), r"tokens: expected ids in \[0, 3\) at positions, got 7"),
        (lambda: scored(model=lambda tokens: None), r"model: expected logits \(B, L, V\) or an"),
        (lambda: scored(cfg_scale=1.0), "cfg_scale: score_span sets or cannot use it"),
        (lambda: scored(mask=torch.ones(1, 3) > 0), "mask: score_span sets or cannot use it"),
    ],
)
def test_errors_name_the_argument(run, message):
    with pytest.raises(ValueError, match=message):
        run()

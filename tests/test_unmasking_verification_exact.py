"""speculative_verify: the tokens of a step are the target's, exactly, whatever the drafts are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from torch_winnow.reference.verification import accepts, invert, residual
from torch_winnow.unmasking import speculative_verify

INF = float("inf")
NAN = float("nan")


def philox(seed: int, row: int, element: int) -> list[float]:
    """The two 64-bit uniforms of one Philox4x32-10 block."""
    low = 0xFFFFFFFF
    c = [element & low, element >> 32, row & low, row >> 32]
    key = [seed & low, seed >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ key[0], p1 & low, p0 >> 32 ^ c[3] ^ key[1], p0 & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return [((c[1] << 32 | c[0]) + 0.5) / 2**64, ((c[3] << 32 | c[2]) + 0.5) / 2**64]


def decided(drafts, q, p, seed: int, row: int) -> list[int]:
    """The tokens of a row by the definition, from the operator's uniforms; one slice, no bonus."""
    tokens = []
    for j, draft in enumerate(drafts.tolist()):
        given = torch.eye(p.shape[-1])[draft] if q is None else q[j]
        if accepts(p[j], given, draft, philox(seed, row, (j + 1 << 32) - 1)[0]):
            tokens.append(draft)
            continue
        tokens.append(invert(residual(p[j], given), philox(seed, row, j << 32)[1]))
        break
    return tokens + [-1] * (len(drafts) - len(tokens))


@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "certain"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_decisions_are_the_definitions_for_the_same_uniforms(wide, certain):
    batch, vocab, seed = 1500, 6, 77
    q, p = 2 * torch.randn(2, batch, 2, vocab, dtype=wide)
    drafts = q.softmax(-1).view(-1, vocab).multinomial(1).view(batch, 2)
    result = speculative_verify(drafts, None if certain else q, p, seed=seed)
    p, q = p.double().softmax(-1), q.double().softmax(-1)
    for b in range(batch):
        expected = decided(drafts[b], None if certain else q[b], p[b], seed, b)
        assert result.tokens[b].tolist() == expected
        if result.accepted[b] < 2:
            assert result.token[b] == expected[result.accepted[b]]


@pytest.mark.parametrize("peaked", [0.5, 4.0])
def test_definition_over_a_grid_of_uniforms(peaked):
    """Draft, acceptance and residual together give the target: to 1/n, without any randomness."""
    vocab, n = 5, 400
    grid = ((torch.arange(n) + 0.5) / n).tolist()
    for seed in range(3):
        torch.manual_seed(seed)
        q, p = (peaked * torch.randn(2, vocab, dtype=torch.float64)).softmax(-1)
        outcome = torch.zeros(vocab, dtype=torch.float64)
        for draft in range(vocab):
            share = sum(accepts(p, q, draft, u) for u in grid) / n
            outcome[draft] += q[draft] * share
            for u in grid:
                outcome[invert(residual(p, q), u)] += q[draft] * (1 - share) / n
        assert (outcome - p).abs().max() < 2 / n


OUTCOMES = torch.tensor(list(itertools.product(range(3), repeat=3)))  # of three positions


def given_known(joint: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Probabilities of the outcomes given the known tokens (-1: unknown), not normalised."""
    agrees = (known[:, None] < 0) | (known[:, None] == OUTCOMES)
    return joint * agrees.all(-1)


def conditionals(joint, tokens, order) -> torch.Tensor:
    """Row i: the log-probabilities of position i given those before it in the order."""
    batch = tokens.shape[0]
    rows = torch.arange(batch)
    known = torch.full((batch, 3), -1)
    logits = torch.empty(batch, 3, 3, dtype=torch.float64)
    for j in range(3):
        place = order[:, j]
        weights = given_known(joint, known)
        one_hot = torch.nn.functional.one_hot(OUTCOMES[:, place].T, 3).double()  # B, 27, 3
        logits[rows, place] = torch.einsum("bo,bov->bv", weights, one_hot).log()
        known[rows, place] = tokens[rows, place]
    return logits


@pytest.mark.parametrize("drafting", ["marginals", "wrong", "certain"])
@pytest.mark.parametrize("kind", ["chain", "any order"])
def test_sequences_follow_the_target(kind, drafting):
    """Chi-square over all 27 sequences, completed by the target; rejects at p < 1e-4."""
    scipy_stats = pytest.importorskip("scipy.stats")
    batch = 25_000
    joint = (1.3 * torch.randn(27, dtype=torch.float64)).softmax(0)
    one_hot = torch.nn.functional.one_hot(OUTCOMES, 3).double()
    draft = torch.einsum("o,oiv->iv", joint, one_hot)
    if drafting != "marginals":
        draft = torch.randn(3, 3, dtype=torch.float64).softmax(-1)
    tokens = torch.stack([row.multinomial(batch, replacement=True) for row in draft], 1)
    if drafting == "certain":
        tokens = torch.tensor([2, 0, 1]).expand(batch, 3)
    draft_logits = None if drafting == "certain" else draft.log().expand(batch, 3, 3).float()
    if kind == "chain":
        order = torch.arange(3).expand(batch, 3)
        target = conditionals(joint, tokens, order).float()
        given = None if draft_logits is None else draft_logits[:, :2]
        result = speculative_verify(tokens[:, :2], given, target, seed=5)
    else:
        order = torch.rand(batch, 3).argsort(1)
        target = conditionals(joint, tokens, order).float()
        result = speculative_verify(tokens, draft_logits, target, order=order, seed=5)
    assert len(result.accepted.unique()) > 1  # the drafts are sometimes right, sometimes wrong
    sequence = torch.empty_like(order).scatter_(1, order, result.tokens)
    completed = given_known(joint, sequence).multinomial(1)[:, 0]
    counts = torch.bincount(completed, minlength=27).double()
    statistic = ((counts - batch * joint) ** 2 / (batch * joint)).sum()
    assert scipy_stats.chi2.sf(statistic.item(), 26) > 1e-4


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float64])
def test_residuals_over_several_slices(wide):
    """Chi-square of the step's token over a vocabulary of two slices, a draft that covers part."""
    scipy_stats = pytest.importorskip("scipy.stats")
    batch, vocab = 6000 if wide != torch.float64 else 1000, 9000
    ids = torch.tensor([0, 17, 8191, 8192, 8999])
    p = torch.full((1, 2, vocab), -INF)
    q = torch.full((1, 1, vocab), -INF)
    p[0, 0, ids] = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.5])
    q[0, 0, ids[:4]] = torch.tensor([2.0, 0.0, 1.0, 0.5])
    p[0, 1, 0] = 0.0
    drafts = (q[0, 0] / 1.5).softmax(-1).multinomial(batch, replacement=True)[:, None]
    p, q = p.to(wide).expand(batch, -1, -1), q.to(wide).expand(batch, -1, -1)
    first = speculative_verify(drafts, q, p, seed=2, temperature=1.5).tokens[:, 0]
    expected = batch * (p[0, 0, ids].double() / 1.5).softmax(-1)
    counts = torch.tensor([(first == i).sum() for i in ids]).double()
    assert counts.sum() == batch
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert scipy_stats.chi2.sf(statistic.item(), 4) > 1e-4


def test_draws_are_exact_in_the_tail():
    """Tokens of 1e-6 each, 8000 of them, after a certain draft was rejected or not."""
    vocab, batch = 8001, 30_000
    target = torch.full((1, 1, vocab), -13.8)
    target[0, 0, 0] = 0.0
    share = 8000 * math.exp(-13.8)
    share /= 1 + share
    drafts = torch.zeros(batch, 1, dtype=torch.int64)
    result = speculative_verify(drafts, None, target.expand(batch, 1, vocab), seed=4)
    tail = (result.tokens[:, 0] > 0).sum().item()
    assert tail == (result.accepted == 0).sum()
    # Binomial: 5 standard deviations, an error rate under 1e-6.
    assert abs(tail - batch * share) < 5 * math.sqrt(batch * share)
    assert result.token.unique().numel() > 0.9 * tail

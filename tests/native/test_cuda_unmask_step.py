"""unmask_step_ on the GPU at its edges; against its definition: tests/test_unmasking_step.py."""

from __future__ import annotations

import host_library
import pytest
import torch

from torch_winnow.unmasking import (
    EntropyBound,
    TopK,
    logit_stats,
    unmask_step_,
)

MASK = 50


def problem(gpu, dtype=torch.float32, batch=2, length=9, vocab=60):
    tokens = torch.randint(0, vocab, (batch, length))
    tokens[torch.rand(batch, length) < 0.7] = MASK
    logits = 3 * torch.randn(batch, length, vocab) * torch.rand(batch, length, 1)
    return tokens.to(gpu), logits.to(gpu, dtype)


def test_draws_are_those_of_logit_stats(gpu, on_every_order):
    tokens, logits = problem(gpu, vocab=9000)
    mask = tokens == MASK
    stats = logit_stats(logits, mask=mask, suppress_ids=[MASK], seed=3)

    def step():
        written = tokens.clone()
        result = unmask_step_(written, logits, mask_id=MASK, rule=TopK(4), seed=3)
        return written, result.transfer

    for written, transfer in on_every_order(step):
        assert torch.equal(written, torch.where(transfer, stats.token, tokens))
        assert transfer.sum(1).tolist() == mask.sum(1).clamp(max=4).tolist()


def test_tokens_may_be_strided_or_narrow(gpu):
    tokens, logits = problem(gpu)
    expected = tokens.clone()
    unmask_step_(expected, logits, mask_id=MASK, rule=TopK(2))
    narrow = torch.zeros(9, 4, dtype=torch.int32, device=gpu).T[::2]
    narrow.copy_(tokens)
    unmask_step_(narrow, logits, mask_id=MASK, rule=TopK(2))
    assert torch.equal(narrow.long(), expected)


def test_huge_temperature(gpu):
    stats = logit_stats(torch.tensor([[3.0, -2.0, -float("inf")]], device=gpu), temperature=1e60)
    torch.testing.assert_close(stats.entropy, torch.tensor([2.0], device=gpu).log())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator counts launches")
@pytest.mark.parametrize(("options", "launches"), [({}, 3), ({"top_k": 4}, 4)], ids=str)
def test_few_launches(gpu, options, launches):
    tokens, logits = problem(gpu)
    before = host_library.launches()
    unmask_step_(tokens, logits, mask_id=MASK, rule=EntropyBound(1.0), seed=1, **options)
    assert host_library.launches() - before == launches

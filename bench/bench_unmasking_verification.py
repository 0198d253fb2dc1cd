"""Speculative verification and soft embeddings against their composition in plain PyTorch.

The rivals are written from the definitions as inference code writes them: softmax of both models,
gathered ratios, a cumulated product, a multinomial of the residual; softmax, sort and a matrix
product over the nucleus (``dense``), or over its widest row's tokens (``gathered``).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torch_winnow import reference
from torch_winnow.unmasking import soft_embedding, speculative_verify

VOCAB = 126_464


def compose(drafts: Tensor, draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    p = target_logits.float().softmax(-1)
    q = draft_logits.float().softmax(-1)
    steps = drafts.shape[1]
    ratio = (p[:, :steps] / q).gather(-1, drafts[..., None])[..., 0]
    accepted = (torch.rand_like(ratio) < ratio).cumprod(1).sum(1)
    q = torch.cat([q, torch.zeros_like(q[:, :1])], 1)
    row = accepted[:, None, None].expand(-1, 1, p.shape[-1])
    residual = (p.gather(1, row) - q.gather(1, row)).clamp(min=0)[:, 0]
    token = residual.multinomial(1)
    kept = torch.arange(steps + 1) < accepted[:, None]
    tokens = torch.where(kept, torch.nn.functional.pad(drafts, (0, 1)), -1)
    return tokens.scatter(1, accepted[:, None], token)


def ours(drafts: Tensor, draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    return speculative_verify(drafts, draft_logits, target_logits, seed=1).tokens


def make_models(batch: int, steps: int, spread: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Peaked predictions; the larger the spread, the worse the draft."""
    torch.manual_seed(0)
    target = 2 * torch.randn(batch, steps + 1, VOCAB)
    top = torch.randint(0, VOCAB, (batch, steps + 1, 1))
    target.scatter_(2, top, 18.0)
    draft = target[:, :steps] + spread * torch.randn(batch, steps, VOCAB)
    drafts = draft.softmax(-1).view(-1, VOCAB).multinomial(1).view(batch, steps)
    return drafts, draft.to(dtype), target.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("drafting", ["good", "poor"])
@pytest.mark.parametrize(("batch", "steps"), [(1, 4), (8, 4)])
@pytest.mark.parametrize("impl", ["winnow", "composed"])
def test_speculative_verify(measure, impl, batch, steps, drafting, dtype):
    inputs = make_models(batch, steps, 0.3 if drafting == "good" else 3.0, dtype)
    drafts, draft, target = inputs
    greedy = speculative_verify(drafts, None, target, temperature=0.0)
    expected = reference.speculative_verify(drafts, None, target.float(), temperature=0.0)
    assert torch.equal(greedy.tokens, expected.tokens)
    read = speculative_verify(drafts, draft, target, seed=1).accepted + 1
    measure(
        f"speculative_verify {batch}x{steps}x{VOCAB} {str(dtype)[6:]}, {drafting} drafts",
        impl,
        ours if impl == "winnow" else compose,
        inputs=[inputs],
        moved_bytes=int(read.sum()) * 2 * VOCAB * dtype.itemsize,
        rounds=9,
    )


def nucleus(logits: Tensor, top_p: float = 0.9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorted probabilities renormalised to the nucleus, their tokens, and the share of the mix."""
    p = logits.float().softmax(-1)
    entropy = torch.special.entr(p).sum(-1)
    ordered, order = p.sort(-1, descending=True)
    kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    alpha = 0.2 * (1 - entropy / math.log(logits.shape[-1]))
    return kept / kept.sum(-1, keepdim=True), order, alpha[..., None], p


def dense(logits: Tensor, embedding: Tensor, base: Tensor) -> Tensor:
    weights, order, alpha, p = nucleus(logits)
    weights = torch.empty_like(p).scatter_(-1, order, weights).to(embedding.dtype)
    return ((1 - alpha) * base + alpha * (weights @ embedding)).to(embedding.dtype)


def gathered(logits: Tensor, embedding: Tensor, base: Tensor) -> Tensor:
    weights, order, alpha, _ = nucleus(logits)
    width = int((weights > 0).sum(-1).max())
    rows = embedding[order[..., :width]]
    soft = (weights[..., None, :width].to(embedding.dtype) @ rows)[..., 0, :]
    return ((1 - alpha) * base + alpha * soft).to(embedding.dtype)


def our_embedding(logits: Tensor, embedding: Tensor, base: Tensor) -> Tensor:
    return soft_embedding(logits, embedding, mask_embedding=base)


EMBEDDINGS = {"winnow": our_embedding, "dense": dense, "gathered": gathered}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("impl", EMBEDDINGS)
def test_soft_embedding(measure, impl, rows, dtype):
    width = 1024
    torch.manual_seed(0)
    logits = 2 * torch.randn(rows, VOCAB)  # twenty likely tokens, in no tie
    logits.scatter_(1, torch.randint(0, VOCAB, (rows, 20)), 16 + torch.rand(rows, 20))
    embedding = torch.randn(VOCAB, width).to(dtype)
    inputs = (logits.to(dtype), embedding, embedding[0])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(
        EMBEDDINGS[impl](*inputs).float(),
        reference.soft_embedding(*inputs[:2], mask_id=0).float(),
        rtol=tolerance,
        atol=tolerance,
    )
    measure(
        f"soft_embedding {rows}x{VOCAB}, {width} columns, {str(dtype)[6:]}",
        impl,
        EMBEDDINGS[impl],
        inputs=[inputs],
        moved_bytes=logits.numel() * dtype.itemsize,
        rounds=5,
    )

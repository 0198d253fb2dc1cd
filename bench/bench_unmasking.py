"""One decoding step against the published step code of masked diffusion models, in plain PyTorch.

Every rival is written from the definition that its paper or its documentation gives and returns the
positions it would write now. ``amax`` is the limit: one read of the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torch_winnow import reference
from torch_winnow._unmasking.rules import Rule
from torch_winnow.unmasking import (
    ConfidenceThreshold,
    EntropyBound,
    TopK,
    logit_stats,
    select_positions,
    unmask_step_,
)

LENGTH, VOCAB = 256, 126_464  # LLaDA's vocabulary, 130 MB in float32
MASK_ID = VOCAB - 1
COUNT = 8


def best(score: Tensor, masked: Tensor, count: int = COUNT) -> Tensor:
    chosen = score.masked_fill(~masked, -torch.inf).topk(count).indices
    return torch.zeros_like(masked).scatter(1, chosen, True)


def llada(logits: Tensor, masked: Tensor) -> Tensor:
    token = logits.argmax(-1)
    p = logits.softmax(-1)
    return best(p.gather(-1, token[..., None])[..., 0], masked)


def llada_gumbel(logits: Tensor, masked: Tensor) -> Tensor:
    wide = logits.double()
    noise = torch.rand_like(wide)
    token = (wide.exp() / -noise.log()).argmax(-1)
    p = logits.softmax(-1)
    return best(p.gather(-1, token[..., None])[..., 0], masked)


def fast_dllm(logits: Tensor, masked: Tensor) -> Tensor:
    token = logits.argmax(-1)
    p = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
    confident = (p >= 0.9) & masked
    return confident | best(p, masked, 1)


def scatter_rows(score: Tensor, masked: Tensor) -> Tensor:
    return torch.full(masked.shape, -torch.inf, dtype=score.dtype).masked_scatter(masked, score)


def dream_entropy(logits: Tensor, masked: Tensor) -> Tensor:
    p = logits[masked].softmax(-1)
    p.max(-1)
    negative_entropy = (p * (p + 1e-10).log()).sum(-1)
    return best(scatter_rows(negative_entropy, masked), masked)


def dream_margin(logits: Tensor, masked: Tensor) -> Tensor:
    p = logits[masked].softmax(-1)
    ordered = p.sort(-1, descending=True).values
    return best(scatter_rows(ordered[:, 0] - ordered[:, 1], masked), masked)


def dream_nucleus(logits: Tensor, masked: Tensor) -> Tensor:
    kept = logits[masked]
    ordered, order = kept.sort(-1, descending=True)
    beyond = ordered.softmax(-1).cumsum(-1) > 0.95
    beyond[:, 1:] = beyond[:, :-1].clone()
    beyond[:, 0] = False
    dropped = torch.zeros_like(beyond).scatter(1, order, beyond)
    p = kept.masked_fill(dropped, torch.finfo(kept.dtype).min).softmax(-1)
    p.max(-1)
    negative_entropy = (p * (p + 1e-10).log()).sum(-1)
    return best(scatter_rows(negative_entropy, masked), masked)


def klass(logits: Tensor, previous: Tensor, masked: Tensor) -> Tensor:
    token = logits.argmax(-1)
    p = logits.softmax(-1)
    confidence = p.gather(-1, token[..., None])[..., 0]
    before = previous.softmax(-1)
    kl = (p * ((p + 1e-12).log() - (before + 1e-12).log())).sum(-1)
    ready = (kl < 0.01) & (confidence > 0.9) & masked
    return ready if ready.any() else best(confidence, masked, COUNT)


def diffusers_bound(logits: Tensor, masked: Tensor) -> Tensor:
    p = logits.float().softmax(-1)
    torch.multinomial(p.view(-1, p.shape[-1]), 1)
    entropy = -(p * p.clamp(min=1e-20).log()).sum(-1).masked_fill(~masked, torch.inf)
    ordered, order = entropy.sort(-1)
    accepted = ordered.cumsum(-1) - ordered <= 20.0
    return torch.zeros_like(masked).scatter(1, order, accepted) & masked


def step(rule: Rule, **options: object) -> Callable[[Tensor, Tensor], Tensor]:
    def run(logits: Tensor, masked: Tensor) -> Tensor:
        tokens = torch.where(masked, MASK_ID, 0)
        return unmask_step_(tokens, logits, mask_id=MASK_ID, rule=rule, **options).transfer

    return run


def klass_step(logits: Tensor, previous: Tensor, masked: Tensor) -> Tensor:
    """As ``generate`` does it for KLStability, with stability at the step before taken as given."""
    tokens = torch.where(masked, MASK_ID, 0)
    stats = logit_stats(logits, mask=masked, temperature=0.0, previous_logits=previous)
    ready = (stats.kl < 0.01) & (stats.max_prob > 0.9) & masked
    most, _ = select_positions(stats.max_prob, masked, TopK(COUNT, score="confidence"))
    chosen = torch.where(ready.any(1, keepdim=True), ready, most)
    tokens[chosen] = stats.token[chosen]
    return chosen


# Name of the step: the published code, ours, rounds of the former, whether choices may differ:
# they draw, or a nucleus of one token leaves many positions with an entropy of 0.
STEPS = {
    "LLaDA T=0": (llada, step(TopK(COUNT), temperature=0.0), 5, False),
    "LLaDA T=1": (llada_gumbel, step(TopK(COUNT), statistics="raw", seed=1), 2, True),
    "Fast-dLLM": (fast_dllm, step(ConfidenceThreshold(0.9), temperature=0.0), 3, False),
    "Dream entropy": (dream_entropy, step(TopK(COUNT, score="entropy")), 3, False),
    "Dream entropy, top-p 0.95": (
        dream_nucleus,
        step(TopK(COUNT, score="entropy"), top_p=0.95),
        1,
        True,
    ),
    "Dream margin": (dream_margin, step(TopK(COUNT, score="margin")), 1, False),
    "diffusers entropy bound": (diffusers_bound, step(EntropyBound(20.0), seed=1), 2, True),
    "KLASS": (klass, klass_step, 1, False),
}


def make_logits(dtype: torch.dtype) -> Tensor:
    logits = 2 * torch.randn(1, LENGTH, VOCAB)
    logits[..., MASK_ID] = -torch.inf  # the published code does not keep the mask from being drawn
    # Some positions are surer than others, as in a model.
    sure = torch.randint(0, MASK_ID, (LENGTH,))
    logits[0, torch.arange(LENGTH), sure] += 20 * torch.rand(LENGTH)
    return logits.to(dtype)


@pytest.mark.parametrize("share", [1.0, 0.25], ids=["all masked", "25% masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["winnow", "published"])
@pytest.mark.parametrize("name", STEPS)
def test_step(measure, name, impl, dtype, share):
    published, ours, rounds, differs = STEPS[name]
    logits = make_logits(dtype)
    masked = torch.rand(1, LENGTH) < share
    inputs = (logits, masked)
    if name == "KLASS":
        inputs = (logits, logits + 0.1 * torch.randn_like(logits), masked)
    if impl == "winnow" and not differs and dtype == torch.float32:
        assert torch.equal(ours(*inputs), published(*inputs))
    measure(
        f"unmasking step, {name}, 1x{LENGTH}x{VOCAB} {str(dtype)[6:]}, {share:.0%} masked",
        impl,
        ours if impl == "winnow" else published,
        inputs=[inputs],
        moved_bytes=(len(inputs) - 1) * logits.nbytes * share,
        rounds=9 if impl == "winnow" else rounds,
    )


STATS = {
    "winnow": logit_stats,
    "winnow with a draw": lambda logits: logit_stats(logits, seed=1),
    "winnow, top-p 0.95": lambda logits: logit_stats(logits, top_p=0.95),
    "winnow, top-k 50": lambda logits: logit_stats(logits, top_k=50),
    "winnow with KL": lambda logits: logit_stats(logits, previous_logits=logits),
    "amax": lambda logits: logits.amax(-1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("impl", STATS)
def test_logit_stats(measure, impl, dtype):
    logits = make_logits(dtype)
    if impl == "winnow":
        rows = logits[:, :4]
        expected = reference.logit_stats(rows.double()).entropy.float()
        torch.testing.assert_close(logit_stats(rows).entropy, expected, rtol=3e-5, atol=3e-6)
    measure(
        f"logit_stats 1x{LENGTH}x{VOCAB} {str(dtype)[6:]}",
        impl,
        STATS[impl],
        inputs=[(logits,)],
        moved_bytes=logits.nbytes,
        rounds=9,
    )


@pytest.mark.parametrize("impl", ["winnow", "amax"])
def test_few_long_rows(measure, impl):
    """One row of a large vocabulary: slices of it fill the threads."""
    logits = make_logits(torch.float32)[:, :1]
    measure(
        f"logit_stats 1x1x{VOCAB} float32",
        impl,
        STATS[impl],
        inputs=[(logits,)],
        moved_bytes=logits.nbytes,
    )

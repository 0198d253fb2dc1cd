"""A whole decode without the model: what the loop itself costs, against the published loops.

The model hands out the same logits at every call, at no cost. Every rival is written from the
definition that its paper or its documentation gives.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torch_winnow.unmasking import generate, presets

LENGTH, BLOCK, VOCAB = 64, 32, 126_464  # LLaDA's vocabulary
MASK_ID = VOCAB - 1


def llada(logits: Tensor, steps: int = 16) -> Tensor:
    tokens = torch.full((1, LENGTH), MASK_ID)
    for end in range(BLOCK, LENGTH + 1, BLOCK):
        for _ in range(steps):
            masked = tokens == MASK_ID
            token = logits.argmax(-1)
            p = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
            p[:, end:] = -torch.inf
            best = p.masked_fill(~masked, -torch.inf).topk(BLOCK // steps).indices
            tokens = tokens.scatter(1, best, token.gather(1, best))
    return tokens


def fast_dllm(logits: Tensor) -> Tensor:
    tokens = torch.full((1, LENGTH), MASK_ID)
    for end in range(BLOCK, LENGTH + 1, BLOCK):
        while bool((tokens[:, :end] == MASK_ID).any()):
            masked = tokens == MASK_ID
            masked[:, end:] = False
            token = logits.argmax(-1)
            p = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
            p = p.masked_fill(~masked, -torch.inf)
            chosen = (p >= 0.9).scatter(1, p.argmax(-1, keepdim=True), True)
            tokens = torch.where(chosen, token, tokens)
    return tokens


def ours(**sampler: object) -> Callable[[Tensor], Tensor]:
    def run(logits: Tensor) -> Tensor:
        tokens = torch.full((1, LENGTH), MASK_ID)
        return generate(lambda _: logits, tokens, mask_id=MASK_ID, **sampler).tokens

    return run


# Name of the decode: the published loop, ours.
DECODES = {
    "LLaDA, 32 steps": (
        llada,
        ours(**presets.llada(gen_length=LENGTH, steps=32, block_length=BLOCK)),
    ),
    "Fast-dLLM": (fast_dllm, ours(**presets.fast_dllm(block_length=BLOCK))),
}


@pytest.mark.parametrize("impl", ["winnow", "published"])
@pytest.mark.parametrize("name", DECODES)
def test_decode(measure, name, impl):
    published, winnow = DECODES[name]
    logits = 2 * torch.randn(1, LENGTH, VOCAB)
    logits[..., MASK_ID] = -torch.inf
    sure = torch.randint(0, MASK_ID, (LENGTH,))
    logits[0, torch.arange(LENGTH), sure] += 10 + 12 * torch.rand(LENGTH)
    if impl == "winnow":
        assert torch.equal(winnow(logits), published(logits))
    measure(
        f"unmasking decode, {name}, 1x{LENGTH}x{VOCAB} float32",
        impl,
        winnow if impl == "winnow" else published,
        inputs=[(logits,)],
        rounds=5 if impl == "winnow" else 2,
    )


@pytest.mark.parametrize("impl", ["winnow", "amax per call"])
def test_one_call_is_one_read(measure, impl):
    """A step of one position in a short row: all that is left is what a step costs by itself."""
    logits = torch.randn(1, 8, 64)

    def limit(logits: Tensor) -> None:
        for _ in range(8):
            logits.amax(-1)

    def decode(logits: Tensor) -> Tensor:
        tokens = torch.full((1, 8), 64)
        return generate(lambda _: logits, tokens, mask_id=64, **presets.med(threshold=0.0)).tokens

    measure(
        "unmasking decode, 8 calls of 1x8x64 float32",
        impl,
        decode if impl == "winnow" else limit,
        inputs=[(logits,)],
        rounds=9,
    )

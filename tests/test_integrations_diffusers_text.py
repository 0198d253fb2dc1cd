"""Steering inside a diffusers pipeline that writes text by unmasking it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from torch_winnow.models import MaskedDiffusion, MaskedDiffusionConfig, StackConfig
from torch_winnow.resampling import FKSteering

diffusers = pytest.importorskip("diffusers")

from torch_winnow.integrations.diffusers import FKSteeringCallback  # noqa: E402


class Denoiser(torch.nn.Module):
    """A masked diffusion model, called as the pipeline calls LLaDA."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        stack = StackConfig(width=16, depth=1, heads=2)
        self.model = MaskedDiffusion(MaskedDiffusionConfig(stack, vocab_size=12, max_tokens=32))

    def forward(self, tokens, attention_mask, position_ids):
        return SimpleNamespace(logits=self.model(tokens))


MASK, EOS, WANTED = 12, 0, 3


def write(callback=None, *, prompts=2, particles=8, **options):
    """``(P * K, 16)`` tokens after prompts of 4, in blocks of 8."""
    pipe = diffusers.LLaDA2Pipeline(Denoiser(), diffusers.BlockRefinementScheduler())
    pipe.set_progress_bar_config(disable=True)
    given = torch.randint(1, 12, (prompts, 4), generator=torch.Generator().manual_seed(1))
    arguments = {
        "input_ids": given.repeat_interleave(particles, 0),
        "gen_length": 16,
        "block_length": 8,
        "num_inference_steps": 4,
        "temperature": 1.0,
        "threshold": 2.0,
        "editing_threshold": None,
        "mask_token_id": MASK,
        "generator": torch.Generator().manual_seed(2),
        "output_type": "seq",
        **options,
    }
    if callback is None:
        return pipe(**arguments).sequences
    with callback.watch(pipe):
        return pipe(**arguments, callback_on_step_end=callback).sequences


def wanted(tokens):
    return (tokens == WANTED).double().sum(1)


@pytest.mark.parametrize("reward_on", ["clean", "sample"])
def test_masked_diffusion_of_text(reward_on):
    def callback(lmbda):
        steering = FKSteering("max", lmbda, seed=0)
        return FKSteeringCallback(steering, reward, 8, sample="block_x", reward_on=reward_on)

    lengths, masks = [], []

    def reward(tokens):
        lengths.append(tokens.shape[1])
        masks.append((tokens == MASK).any().item())
        return wanted(tokens)

    plain = write()
    assert (plain != MASK).all()
    assert torch.equal(write(callback(0.0)), plain)
    assert set(lengths) == {8, 16, 24}
    assert any(masks) == (reward_on == "sample")
    steered = callback(3.0)
    tokens = write(steered)
    final = steered.finish(tokens)
    assert (wanted(final).view(2, 8).mean(1) > wanted(plain).view(2, 8).mean(1) + 1).all()
    torch.testing.assert_close(steered.steering.reward.flatten(), wanted(final))
    assert torch.equal(wanted(steered.select(final)), wanted(final).view(2, 8).amax(1))


def test_rows_that_have_ended_are_carried():
    """A row that takes the slot of an ended one goes on, so no mask is left before an end."""
    generator = torch.Generator().manual_seed(5)

    def reward(tokens):
        return torch.randn(len(tokens), generator=generator)

    steering = FKSteering("difference", 1.5, ess_threshold=None, seed=0)
    callback = FKSteeringCallback(steering, reward, 16, sample="block_x")
    tokens = write(callback, particles=16, eos_token_id=EOS)
    ended = (tokens == EOS).int().cumsum(1) > 0
    assert ended.any()
    assert not ended.any(1).all()
    assert ((tokens != MASK) | ended).all()
    with pytest.raises(ValueError, match=r"LLaDA2Pipeline to run inside `with callback.watch"):
        write(callback_on_step_end=callback)

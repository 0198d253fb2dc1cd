"""Steering inside diffusers pipelines, tiny and with random weights: nothing is downloaded."""

from __future__ import annotations

import functools

import pytest
import torch

from torch_winnow.resampling import FKSteering

diffusers = pytest.importorskip("diffusers")

from torch_winnow.integrations.diffusers import FKSteeringCallback  # noqa: E402
from torch_winnow.integrations.diffusers.scheduler import watched  # noqa: E402

pytestmark = [  # of schedulers in numpy 2
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PROMPTS, PARTICLES = 2, 4
ROWS = PROMPTS * PARTICLES
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(pipe, scheduler, callback=None, *, prompts=PROMPTS, each=PARTICLES, steps=6, **options):
    """Latents of ``prompts`` prompts with guidance, from the same noise every time."""
    pipe.scheduler = scheduler
    arguments = {
        "prompt_embeds": noise(PROMPTS, 5, 8, seed=1)[:prompts],
        "negative_prompt_embeds": noise(PROMPTS, 5, 8, seed=2)[:prompts],
        "num_images_per_prompt": each,
        "num_inference_steps": steps,
        "height": 8,
        "width": 8,
        "latents": noise(ROWS, *SHAPE)[: prompts * each],
        "generator": torch.Generator().manual_seed(4),
        "output_type": "latent",
        **options,
    }
    if callback is None:
        return pipe(**arguments).images
    with callback.watch(pipe):
        return pipe(**arguments, callback_on_step_end=callback).images


def brightness(samples):
    return samples[:, 0].mean((1, 2))


def steered(lmbda=60.0, kind="max", seed=0, ess_threshold=0.9, **options):
    steering = FKSteering(kind, lmbda, ess_threshold=ess_threshold, seed=seed)
    return FKSteeringCallback(steering, brightness, PARTICLES, **options)


def origins(callback):
    """``(P * K,)``: the row at the start of the run from which each row descends."""
    slot = torch.arange(PARTICLES).expand(len(callback.results[0].ancestors), -1)
    for result in reversed(callback.results):
        slot = result.ancestors.gather(1, slot)
    return (slot + PARTICLES * torch.arange(len(slot)).unsqueeze(1)).flatten()


# A random network's output is no noise: taken for v, it gives predictions of order one.
V = {"prediction_type": "v_prediction"}
DETERMINISTIC = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **V),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**V),
    "dpm++ 2": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=2, **V),
    "dpm++ 3": lambda: diffusers.DPMSolverMultistepScheduler(solver_order=3, **V),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver", final_sigmas_type="sigma_min", **V
    ),
    "dpm single": lambda: diffusers.DPMSolverSinglestepScheduler(solver_order=3, **V),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(solver_order=3, **V),
    "deis": lambda: diffusers.DEISMultistepScheduler(**V),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **V),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**V),
    "lms": lambda: diffusers.LMSDiscreteScheduler(**V),
}
WITH_HISTORY = [name for name in DETERMINISTIC if name not in ("ddim", "euler")]


@pytest.fixture(scope="module")
def alone(pipeline):
    """What each initial noise becomes without steering, by the name of the sampler."""
    return functools.cache(lambda name: run(pipeline, DETERMINISTIC[name]()))


def by_chance():
    """A callback whose rewards have nothing to do with the samples: particles move at each step."""
    generator = torch.Generator().manual_seed(3)

    def reward(samples):
        return torch.randn(len(samples), generator=generator)

    steering = FKSteering("difference", 1.5, ess_threshold=None, seed=0)
    return FKSteeringCallback(steering, reward, PARTICLES, steps=(1, 2, 4))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_survivors_are_what_they_would_have_become_alone(pipeline, alone, name):
    """A deterministic sampler takes every particle along the path of its own initial noise,
    whatever slots it passed through: scheduler histories must have moved with it."""
    callback = by_chance()
    together = run(pipeline, DETERMINISTIC[name](), callback)
    slots = torch.arange(PARTICLES)
    assert sum(not torch.equal(r.ancestors, slots.expand(2, -1)) for r in callback.results) >= 3
    assert 2 < origins(callback).unique().numel() < ROWS
    torch.testing.assert_close(together, alone(name)[origins(callback)], rtol=1e-4, atol=1e-4)
    assert "step" not in vars(pipeline.scheduler)


@pytest.mark.parametrize("name", WITH_HISTORY)
def test_without_its_history_a_survivor_goes_astray(pipeline, alone, name, monkeypatch):
    """What the test above would see if a scheduler kept its history in a place we don't look."""
    callback_module = "torch_winnow.integrations.diffusers.callback"
    monkeypatch.setattr(f"{callback_module}.gather_history", lambda scheduler, ancestors: None)
    callback = by_chance()
    together = run(pipeline, DETERMINISTIC[name](), callback)
    assert (together - alone(name)[origins(callback)]).abs().max() > 1e-2


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize(
    "scheduler",
    [diffusers.EulerAncestralDiscreteScheduler, diffusers.DPMSolverMultistepScheduler],
    ids=["ancestral", "multistep"],
)
def test_without_a_tilt_nothing_changes(pipeline, scheduler, threshold):
    latents = run(pipeline, scheduler(**V))
    callback = steered(lmbda=0.0, ess_threshold=threshold)
    assert torch.equal(run(pipeline, scheduler(**V), callback), latents)
    assert len(callback.results) == 6
    torch.testing.assert_close(callback.steering.log_z, torch.zeros(PROMPTS))


@pytest.mark.parametrize("kind", ["difference", "max", "sum"])
def test_rewards_rise(pipeline, kind):
    scheduler = diffusers.EulerAncestralDiscreteScheduler
    plain = brightness(run(pipeline, scheduler(**V))).view(PROMPTS, PARTICLES)
    callback = steered(kind=kind, steps=2)
    latents = run(pipeline, scheduler(**V), callback)
    reward = brightness(latents).view(PROMPTS, PARTICLES)
    assert (reward.mean(1) > plain.mean(1)).all()
    assert len(callback.results) == 3
    torch.testing.assert_close(callback.steering.reward, reward)
    chosen = callback.select(latents)
    torch.testing.assert_close(brightness(chosen), reward.amax(1))
    rows = callback.best().tolist()
    assert callback.select(list(range(ROWS))) == rows
    # The same callback serves the next run, from its beginning.
    run(pipeline, scheduler(**V), callback)
    assert len(callback.results) == 3


def test_prompts_are_independent(pipeline):
    scheduler = diffusers.DPMSolverMultistepScheduler
    both = steered(steps=2)
    latents = run(pipeline, scheduler(**V), both)
    first = steered(steps=2)
    alone = run(pipeline, scheduler(**V), first, prompts=1)
    for of_both, of_first in zip(both.results, first.results, strict=True):
        assert torch.equal(of_both.ancestors[:1], of_first.ancestors)
    torch.testing.assert_close(latents[:PARTICLES], alone, rtol=1e-4, atol=1e-4)
    assert (origins(both).view(PROMPTS, -1) // PARTICLES == torch.arange(2).unsqueeze(1)).all()


def test_tensors_of_their_own_are_carried(pipeline):
    """Each particle has another prompt; with guidance its embeddings are doubled."""
    options = {
        "prompt_embeds": 10 * noise(ROWS, 5, 8, seed=6),
        "negative_prompt_embeds": 10 * noise(ROWS, 5, 8, seed=7),
        "each": 1,
        "latents": noise(ROWS, *SHAPE),
    }
    alone = run(pipeline, DETERMINISTIC["ddim"](), **options)
    for carry in ((), ("prompt_embeds",)):
        callback = by_chance()
        callback.carry = carry
        latents = run(pipeline, DETERMINISTIC["ddim"](), callback, **options)
        difference = (latents - alone[origins(callback)]).abs().max()
        assert difference < 1e-4 if carry else difference > 1e-2


CLEAN = {
    **DETERMINISTIC,
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "ddim sample": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample"),
    "euler ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "dpm noise": lambda: diffusers.DPMSolverMultistepScheduler(),
    "pndm noise": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "unipc sample": lambda: diffusers.UniPCMultistepScheduler(prediction_type="sample"),
    "dpm flow": lambda: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    ),
    "lcm": lambda: diffusers.LCMScheduler(clip_sample=False),
    "tcd": lambda: diffusers.TCDScheduler(clip_sample=False),
    "flow euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
    "edm euler": lambda: diffusers.EDMEulerScheduler(),
    "edm dpm": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
}


@pytest.mark.parametrize("name", CLEAN)
def test_the_clean_prediction_is_the_models(name):
    """A model that knows the one clean sample: every step's prediction is that sample."""
    scheduler = CLEAN[name]()
    scheduler.set_timesteps(6)
    clean = noise(3, *SHAPE, seed=8)
    x = noise(3, *SHAPE, seed=9) * getattr(scheduler, "init_noise_sigma", 1.0)
    seen = []
    with watched(scheduler, seen.append):
        for index, t in enumerate(scheduler.timesteps):
            output = perfect_model(scheduler, x, t, index, clean)
            x = scheduler.step(output, t, x, return_dict=False)[0]
    assert len(seen) == len(scheduler.timesteps) >= 6
    for prediction in seen:
        torch.testing.assert_close(prediction, clean, rtol=2e-3, atol=2e-3)


def test_a_prediction_is_thresholded_as_the_scheduler_does():
    scheduler = diffusers.DPMSolverMultistepScheduler(thresholding=True, sample_max_value=1.5)
    scheduler.set_timesteps(3)
    clean, x = noise(3, *SHAPE, seed=8), noise(3, *SHAPE, seed=9)
    seen = []
    with watched(scheduler, seen.append):
        scheduler.step(perfect_model(scheduler, x, 0, 0, clean), scheduler.timesteps[0], x)
    expected = scheduler._threshold_sample(clean)
    assert not torch.equal(expected, clean)
    torch.testing.assert_close(seen[0], expected, rtol=2e-3, atol=2e-3)


def test_two_may_watch_one_scheduler():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(3)
    x = noise(3, *SHAPE, seed=9)
    outer, inner = [], []
    with watched(scheduler, outer.append):
        with watched(scheduler, inner.append):
            scheduler.step(x, scheduler.timesteps[0], x)
        scheduler.step(x, scheduler.timesteps[1], x)
    scheduler.step(x, scheduler.timesteps[2], x)
    assert (len(outer), len(inner)) == (2, 1)
    assert torch.equal(outer[0], inner[0])


def perfect_model(scheduler, x, t, index, clean):
    kind = getattr(scheduler.config, "prediction_type", "flow_prediction")
    sigma = scheduler.sigmas[index] if hasattr(scheduler, "sigmas") else None
    if kind == "sample":
        return clean
    if kind == "flow_prediction":
        return (x - clean) / sigma
    if hasattr(scheduler, "precondition_outputs"):
        data = scheduler.config.sigma_data
        total = sigma**2 + data**2
        return (clean - data**2 / total * x) / (sigma * data / total**0.5)
    seen = scheduler.scale_model_input(x, t)  # variance preserving, as the model was trained
    share = scheduler.alphas_cumprod[t] if sigma is None else 1 / (1 + sigma**2)
    guess = (seen - share**0.5 * clean) / (1 - share) ** 0.5
    if kind == "v_prediction":
        return share**0.5 * guess - (1 - share) ** 0.5 * clean
    return guess


def test_a_scheduler_whose_prediction_is_unknown(pipeline):
    """It can be steered by its noisy samples, and says so."""
    with pytest.raises(ValueError, match="reward_on: .*IPNDMScheduler .*reward_on='sample'"):
        run(pipeline, diffusers.IPNDMScheduler(), by_chance())
    run(pipeline, diffusers.IPNDMScheduler(), steered(reward_on="sample"))
    pipeline.scheduler = DETERMINISTIC["ddim"]()
    with pytest.raises(ValueError, match=r"inside `with callback.watch\(pipeline\)`"):
        pipeline(
            prompt_embeds=noise(1, 5, 8),
            negative_prompt_embeds=noise(1, 5, 8),
            num_images_per_prompt=PARTICLES,
            num_inference_steps=2,
            height=8,
            width=8,
            callback_on_step_end=steered(),
        )


def test_a_pipeline_of_flow_matching():
    """Flux: packed latents ``(B, N, C)``, and a scheduler that does not tell its prediction."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, shift_factor=0.0)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        transformer=transformer,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipe.set_progress_bar_config(disable=True)

    def generate(callback=None):
        return pipe(
            prompt_embeds=torch.ones(ROWS, 5, 8),
            pooled_prompt_embeds=torch.ones(ROWS, 8),
            num_inference_steps=6,
            height=16,
            width=16,
            latents=noise(ROWS, 64, 16),
            output_type="latent",
            callback_on_step_end=callback,
        ).images

    alone = generate()
    callback = by_chance()
    with callback.watch(pipe):
        together = generate(callback)
    assert len(callback.results) == 4
    assert origins(callback).unique().numel() < ROWS
    torch.testing.assert_close(together, alone[origins(callback)], rtol=1e-4, atol=1e-4)


def test_refusals(pipeline):
    steering = FKSteering()
    for arguments, options, message in (
        (("max", brightness, 4), {}, "steering: expected an FKSteering, got str"),
        ((steering, None, 4), {}, "reward_fn: expected a function, got NoneType"),
        ((steering, brightness, 0), {}, "num_particles: expected an int of at least 1, got 0"),
        ((steering, brightness, 2.0), {}, "num_particles: .*got 2.0"),
        ((steering, brightness, 4), {"steps": 0}, "steps: expected at least 1, .*got 0"),
        ((steering, brightness, 4), {"steps": "all"}, "steps: .*got 'all'"),
        ((steering, brightness, 4), {"reward_on": "x0"}, "reward_on: expected 'clean' or 'sample'"),
        ((steering, brightness, 4), {"carry": "mask"}, "carry: expected .* names, got 'mask'"),
    ):
        with pytest.raises(ValueError, match=message):
            FKSteeringCallback(*arguments, **options)
    scheduler = DETERMINISTIC["ddim"]
    for reward, particles, message in (
        (brightness, 3, "num_particles: expected to divide the batch of 8 samples, got 3"),
        (lambda x: x.mean(), 4, r"reward_fn: expected a tensor of 8 rewards, got \(\)"),
        (lambda x: [0.0] * 8, 4, "reward_fn: expected a tensor of 8 rewards, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            run(pipeline, scheduler(), FKSteeringCallback(FKSteering(), reward, particles))
        assert "step" not in vars(pipeline.scheduler)
    with pytest.raises(ValueError, match="block_x"):
        run(pipeline, scheduler(), FKSteeringCallback(steering, brightness, 4, sample="block_x"))
    callback = FKSteeringCallback(
        steering, brightness, 4, reward_on="sample", carry=("prompt_embeds",)
    )
    states = {"latents": noise(8, *SHAPE), "prompt_embeds": torch.zeros(3, 2)}
    message = r"carry: expected prompt_embeds to have a multiple of 8 rows, got \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        callback.callback_fn(pipeline, 0, 0, states)

"""The callback that steers a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from torch_winnow.integrations.diffusers.scheduler import (
    gather_history,
    gather_rows,
    replaced,
    watched,
)
from torch_winnow.resampling import FKSteering, Resampling

Samples = TypeVar("Samples", Tensor, list[Any])
_NUMBERS = (list, tuple, range, set, frozenset)


class FKSteeringCallback(PipelineCallback):  # type: ignore[misc]
    r"""Steers the samples of a diffusers pipeline towards a reward, as ``callback_on_step_end``.

    Give each prompt ``num_images_per_prompt=num_particles``: they are its particles. After chosen
    steps the reward of each particle's predicted clean sample goes into ``steering``, and latents
    and scheduler history (the model outputs of multistep solvers, for one) follow the ancestors.
    Prompts are independent. The last step is the terminal one, rewarded by the latents themselves:
    from then on the samples, weighted by ``steering.weights``, target
    :math:`p(x) e^{\lambda r(x)}`.

    Predictions live inside ``scheduler.step``: run the pipeline inside :meth:`watch`.

    Pipelines of tokens (``LLaDA2Pipeline``) don't know their last step: call :meth:`finish` with
    the sequences. There the rows of ``input_ids`` are the particles, those of a prompt together.

    Args:
        steering: the controller. It is reset as a pipeline's run begins, so one callback may serve
            many runs; give it a seed, or its draws come from torch's default generator, as the
            pipeline's noise may.
        reward_fn: from samples ``(P * K, ...)``, laid out as the pipeline's, to their rewards
            ``(P * K,)`` or ``(P, K)``. Samples are latents: decode them there where the reward is
            one of images.
        num_particles: K. The samples ``p * K`` to ``p * K + K - 1`` belong to prompt p.
        steps: rewards are asked for after every so many steps, or after the steps whose numbers,
            from 0, are in a collection. The terminal step comes in any case.
        reward_on: ``"clean"``, the predicted clean sample, or ``"sample"``, the noisy one itself.
        sample: the pipeline's name for its samples; ``"block_x"`` in ``LLaDA2Pipeline``.
        carry: further tensors of the pipeline that differ between the particles of a prompt, by
            their names in its ``_callback_tensor_inputs``. Doubled for guidance is fine.

    Attributes:
        results: the :class:`~torch_winnow.resampling.Resampling` of every steering step of the run.

    Raises:
        ValueError: an option that is not as above; in a run, a batch that K does not divide,
            rewards of another number than the samples, or no clean prediction at hand.

    Example:
        ::

            callback = FKSteeringCallback(FKSteering("max", 10.0, seed=0), reward_fn, 4, steps=5)
            with callback.watch(pipeline):
                output = pipeline(
                    prompts, num_images_per_prompt=4, callback_on_step_end=callback
                )
            best = callback.select(output.images)  # one per prompt
    """

    def __init__(
        self,
        steering: FKSteering,
        reward_fn: Callable[[Tensor], Tensor],
        num_particles: int,
        *,
        steps: int | Collection[int] = 1,
        reward_on: str = "clean",
        sample: str = "latents",
        carry: Collection[str] = (),
    ) -> None:
        # The base class asks for a cutoff that this callback has none of.
        if not isinstance(steering, FKSteering):
            raise ValueError(f"steering: expected an FKSteering, got {type(steering).__name__}")
        if not callable(reward_fn):
            raise ValueError(f"reward_fn: expected a function, got {type(reward_fn).__name__}")
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"num_particles: expected an int of at least 1, got {num_particles!r}")
        if not (steps >= 1 if isinstance(steps, int) else isinstance(steps, _NUMBERS)):
            raise ValueError(f"steps: expected at least 1, or a set of numbers, got {steps!r}")
        if reward_on not in ("clean", "sample"):
            raise ValueError(f"reward_on: expected 'clean' or 'sample', got {reward_on!r}")
        if isinstance(carry, str):
            raise ValueError(f"carry: expected a collection of names, got {carry!r}")
        self.steering = steering
        self.reward_fn = reward_fn
        self.num_particles = num_particles
        self.steps = steps
        self.reward_on = reward_on
        self.sample = sample
        self.carry = tuple(carry)
        self.results: list[Resampling] = []
        self._watching = False
        self._clean: Tensor | None = None
        self._ended: Tensor | None = None

    @property
    def tensor_inputs(self) -> list[str]:
        """What the pipeline hands over after each step."""
        return [self.sample, *self.carry]

    @contextmanager
    def watch(self, pipeline: Any) -> Iterator[FKSteeringCallback]:
        """Within it, the pipeline's scheduler lets the callback see its clean predictions."""

        def see(clean: Tensor | None) -> None:
            self._clean = clean

        scheduler = pipeline.scheduler
        with ExitStack() as stack:
            stack.callback(self._leave)
            self._watching = True
            stack.enter_context(watched(scheduler, see))
            if hasattr(scheduler, "check_eos_finished"):
                original = scheduler.check_eos_finished

                def check(*args: Any, **kwargs: Any) -> Tensor:
                    self._ended = original(*args, **kwargs)
                    return self._ended

                stack.enter_context(replaced(scheduler, "check_eos_finished", check))
            yield self

    def _leave(self) -> None:
        self._watching, self._clean, self._ended = False, None, None

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Called by the pipeline after each step."""
        if step_index == 0:
            self.steering.reset()
            self.results = []
        clean, self._clean = self._clean, None
        if not self._watching and hasattr(pipeline.scheduler, "check_eos_finished"):
            raise ValueError(
                f"callback: expected a {type(pipeline).__name__} to run inside `with "
                "callback.watch(pipeline)`, or the rows that have ended would be mixed up"
            )
        steps = getattr(pipeline, "num_timesteps", None) or len(pipeline.scheduler.timesteps)
        terminal = self.sample == "latents" and step_index + 1 == steps
        if not (terminal or self._chosen(step_index)):
            return callback_kwargs
        rewarded: Tensor = callback_kwargs[self.sample]
        if self.reward_on == "clean" and not terminal:
            rewarded = self._clean_samples(clean, rewarded, pipeline.scheduler)
        ancestors = self._decide(rewarded, terminal)
        gather_history(pipeline.scheduler, ancestors)
        if self._ended is not None:  # the pipeline's own tensor of the rows that have ended
            self._ended.copy_(gather_rows(self._ended, ancestors))
        return {**callback_kwargs, **gather_rows(self._carried(callback_kwargs), ancestors)}

    def _chosen(self, step_index: int) -> bool:
        if isinstance(self.steps, int):
            return (step_index + 1) % self.steps == 0
        return step_index in self.steps

    def _carried(self, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        rows = len(callback_kwargs[self.sample])
        carried = {name: callback_kwargs[name] for name in self.tensor_inputs}
        for name, value in carried.items():
            if not isinstance(value, Tensor) or value.dim() == 0 or len(value) % rows != 0:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"carry: expected {name} to have a multiple of {rows} rows, got {got}"
                )
        return carried

    def _clean_samples(self, clean: Tensor | None, samples: Tensor, scheduler: Any) -> Tensor:
        if clean is None:
            raise ValueError(
                "reward_on: 'clean' needs the predicted clean sample, and none is at hand: run the "
                f"pipeline inside `with callback.watch(pipeline)`; if it does, then how a "
                f"{type(scheduler).__name__} predicts is not known: take reward_on='sample'"
            )
        known = samples.shape[1] - clean.shape[1]
        if self.sample != "latents" and known > 0:  # the last block of the tokens so far
            return torch.cat((samples[:, :known], clean), 1)
        return clean

    def _decide(self, samples: Tensor, terminal: bool) -> Tensor:
        """Ancestors ``(P, K)`` by the rewards of the samples."""
        rows, particles = len(samples), self.num_particles
        if rows % particles != 0:
            raise ValueError(
                f"num_particles: expected to divide the batch of {rows} samples, got {particles}"
            )
        reward = self.reward_fn(samples)
        if not isinstance(reward, Tensor) or reward.numel() != rows:
            got = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
            raise ValueError(f"reward_fn: expected a tensor of {rows} rewards, got {got}")
        reward = reward.to(samples.device).reshape(rows // particles, particles)
        result = self.steering.step(reward, terminal=terminal)
        self.results.append(result)
        return result.ancestors

    def finish(self, samples: Tensor) -> Tensor:
        """The terminal step, for a pipeline that does not know its last one.

        Args:
            samples: ``(P * K, ...)`` what the pipeline returned.

        Returns:
            The samples that the last resampling leaves.
        """
        return gather_rows(samples, self._decide(samples, terminal=True))

    def best(self) -> Tensor:
        """``(P,)`` int64: the row of each prompt's sample of highest reward."""
        best = self.steering.best()
        return best + torch.arange(len(best), device=best.device) * self.num_particles

    def select(self, samples: Samples) -> Samples:
        """One of the ``P * K`` samples per prompt: a tensor, or a list such as the images."""
        if isinstance(samples, list):
            return [samples[row] for row in self.best().tolist()]
        return samples[self.best()]

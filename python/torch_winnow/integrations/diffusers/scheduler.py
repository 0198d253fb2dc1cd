"""What only a scheduler knows: the clean sample that it predicts, and its memory of past steps."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_winnow.resampling import gather_particles

Tree = TypeVar("Tree")


@contextmanager
def replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """The instance's method is another one inside the context, with the signature of its own."""
    before = vars(owner).get(name)
    setattr(owner, name, functools.wraps(getattr(owner, name))(method))
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def watched(scheduler: Any, see: Callable[[Tensor | None], None]) -> Iterator[None]:
    """Every step of the scheduler hands its clean prediction to ``see``, None where unknown."""
    original = scheduler.step
    signature = inspect.signature(original)

    def step(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        as_dict = call.arguments.get("return_dict", True)
        call.arguments["return_dict"] = True  # some tuples leave the prediction out
        output = original(*call.args, **call.kwargs)
        see(_clean_prediction(scheduler, output, call.arguments))
        return output if as_dict else output.to_tuple()

    with replaced(scheduler, "step", step):
        yield


def _clean_prediction(scheduler: Any, output: Any, call: Mapping[str, Any]) -> Tensor | None:
    if "sampled_tokens" in output:  # a masked diffusion of tokens: a draw for each that is masked
        tokens: Tensor = output["prev_sample"]
        mask_id = call.get("mask_token_id")
        return tokens if mask_id is None else tokens.where(tokens != mask_id, output.sampled_tokens)
    for name in ("pred_original_sample", "denoised"):
        if output.get(name) is not None:
            prediction: Tensor = output[name]
            return prediction
    sample: Tensor = call["sample"]
    levels = _noise_levels(scheduler, call["timestep"])
    if levels is None:
        return None
    kind, alpha, sigma = levels
    # A model with a learned variance appends its channels.
    x, m = sample.float(), call["model_output"][:, : sample.shape[1]].float()
    if kind == "edm":
        clean: Tensor = scheduler.precondition_outputs(x, m, sigma)
    elif kind == "epsilon":
        clean = (x - sigma * m) / alpha
    elif kind == "v_prediction":
        clean = alpha * x - sigma * m
    else:
        clean = x - sigma * m if kind == "flow_prediction" else m
    if getattr(scheduler.config, "thresholding", False):
        clean = scheduler._threshold_sample(clean)
    return clean.to(sample.dtype)


def _noise_levels(scheduler: Any, timestep: Any) -> tuple[str, Any, Any] | None:
    """What the model predicted in the step just taken, and ``x = alpha * clean + sigma * noise``.

    For the schedulers that do not tell their prediction: multistep solvers, flow matching, and
    those that know nothing but ``alphas_cumprod``.
    """
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    if hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
        share = scheduler.alphas_cumprod[timestep]
        return kind, share**0.5, (1 - share) ** 0.5
    is_flow = type(scheduler).__name__.startswith("FlowMatch")
    if not is_flow and not hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        return None
    sigma = scheduler.sigmas[scheduler.step_index - 1]
    if hasattr(scheduler, "precondition_outputs"):
        return "edm", None, sigma
    if is_flow or kind == "flow_prediction":
        return "flow_prediction", 1 - sigma, sigma
    return kind, *scheduler._sigma_to_alpha_sigma_t(sigma)


def gather_rows(tree: Tree, ancestors: Tensor, *, only_history: bool = False) -> Tree:
    """Tensors of a tree follow the ancestors ``(P, K)``: their rows are P prompts of K particles.

    A multiple of P * K rows is that many copies of the batch one after another, as classifier-free
    guidance lays them. With ``only_history`` all else stays: numbers, tables of noise levels.
    """
    prompts, particles = ancestors.shape
    rows = prompts * particles

    def gather(leaf: Tensor) -> Tensor:
        if only_history and not (leaf.dim() >= 2 and leaf.shape[0] == rows):
            return leaf
        copies = leaf.reshape(-1, prompts, particles, *leaf.shape[1:])
        return gather_particles(copies, ancestors, dim=2).flatten(0, 2)

    return tree_map_only(Tensor, gather, tree)  # type: ignore[no-any-return]


def gather_history(scheduler: Any, ancestors: Tensor) -> None:
    """Everything that the scheduler remembers of its samples follows the ancestors ``(P, K)``.

    Whatever its name: model outputs, derivatives, samples of earlier steps. New tensors take the
    place of the old ones, which may be the caller's latents.
    """
    for name, value in list(vars(scheduler).items()):
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            setattr(scheduler, name, gather_rows(value, ancestors, only_history=True))

"""Training small models in minutes on a CPU: one loop, two optimizers, one schedule.

Matrices that map rows to rows are trained with Muon (Jordan et al., 2024): the momentum is replaced
by the nearest orthogonal matrix, so that every direction of a weight learns at the same pace. With
a budget of a few hundred steps that counts. Embeddings, heads, learned rows and norms are trained
with AdamW.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_winnow import _library

__all__ = ["Muon", "Recipe", "bits_per_token", "fit", "mixed_precision", "next_token_loss"]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Attributes:
        steps: optimizer steps.
        matrix_rate: peak learning rate of matrices that map rows to rows (Muon).
        rate: peak learning rate of everything else (AdamW).
        warmup: share of the steps in which the rates rise; from there they fall linearly to zero.
        clip: largest norm of the gradient of everything else than matrices.
    """

    steps: int
    matrix_rate: float = 0.02
    rate: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0

    def share_of_peak(self, step: int) -> float:
        """The learning rates of a step, as a share of their peak."""
        rising = max(1, round(self.warmup * self.steps))
        return min((step + 1) / rising, (self.steps - step) / max(1, self.steps - rising))


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats of tokens ``(B, N)`` under their own logits ``(B, N, V)``."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten().long())


def bits_per_token(nats: float) -> float:
    """A loss in nats as bits."""
    return nats / math.log(2)


def mixed_precision() -> torch.autocast:
    """bfloat16 matrix products where the CPU has instructions for them, float32 elsewhere.

    Without the instructions bfloat16 is emulated, several times slower than float32.
    """
    native = _library.cpu_capability() == "avx512_bf16"
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=native)


def fit(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    recipe: Recipe,
    *,
    report: Callable[[int, float], object] = lambda step, loss: None,
) -> list[float]:
    """Minimises ``loss_of(step)`` over the model's parameters; returns the losses, one per step.

    ``report(step, loss)`` is called after each step.

    Raises:
        FloatingPointError: if a loss is not finite; the model is then worth nothing.
    """
    matrices, rest = _split(model)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=recipe.matrix_rate),
        torch.optim.AdamW(
            rest, lr=recipe.rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True
        ),
    ]
    peaks = (recipe.matrix_rate, recipe.rate)
    losses = []
    model.train()
    for step in range(recipe.steps):
        with mixed_precision():
            loss = loss_of(step)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"training diverged: the loss of step {step} is {losses[-1]}")
        # Muon normalises its own updates.
        nn.utils.clip_grad_norm_(rest, recipe.clip)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * recipe.share_of_peak(step)
            optimizer.step()
            optimizer.zero_grad()
        report(step, losses[-1])
    model.eval()
    return losses


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices that map rows to rows, and all other parameters.

    The head belongs to the others: its outputs are as unequal as the tokens' frequencies.
    """
    matrices = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "head"
    }
    ordered = list(model.parameters())
    return [p for p in ordered if p in matrices], [p for p in ordered if p not in matrices]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised by five Newton-Schulz steps (Jordan et al., 2024).

    torch.optim.Muon computes in bfloat16 whatever the CPU, and one matrix at a time; here matrices
    of one shape are orthogonalised together, in the precision of :func:`mixed_precision`.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                updates = [self._momentum(p, group["momentum"]) for p in parameters]
                # The root lets tall matrices change their outputs as much as wide ones do.
                scale = -group["lr"] * math.sqrt(max(1.0, rows / columns))
                orthogonal = _orthogonalise(torch.stack(updates)).unbind()
                torch._foreach_add_(parameters, orthogonal, alpha=scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        mean: Tensor = state["momentum"]
        mean.lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum)


def _orthogonalise(matrices: Tensor) -> Tensor:
    """``(n, rows, columns)``, singular values brought near 1."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    with mixed_precision():
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    result: Tensor = x.mT if tall else x
    return result.to(matrices.dtype)

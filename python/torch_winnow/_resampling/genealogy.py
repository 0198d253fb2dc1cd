"""Genealogies: who descends from whom, and paths drawn backwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._resampling.gather import gather_particles
from torch_winnow._resampling.resample import check_seed, resample
from torch_winnow._resampling.weights import (
    detached_weights,
    is_number,
    require_tensor,
    whole_number,
)

_trace_ancestors = torch.ops.winnow.trace_ancestors
_uniforms = torch.ops.winnow.uniforms


def trace_ancestors(ancestors: Tensor, indices: Tensor | None = None) -> Tensor:
    """The particle of every generation that the last generation's particles descend from.

    Args:
        ancestors: ``(T, ..., K)`` int64: slot j of generation t + 1 descends from particle
            ``ancestors[t, ..., j]`` of generation t.
        indices: ``(..., M)`` int64 particles of the last generation whose paths are wanted; by
            default all of them.

    Returns:
        ``(T + 1, ..., M)`` int64: row T is ``indices``, row t the index within generation t.

    Raises:
        ValueError: wrong type, dtype or shape, or an index outside [0, K) (not checked on the GPU).

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import trace_ancestors
        >>> trace_ancestors(torch.tensor([[0, 0, 2], [1, 1, 2]]))
        tensor([[0, 0, 2],
                [1, 1, 2],
                [0, 1, 2]])
    """
    require_tensor("ancestors", ancestors, "an int64 tensor (T, ..., K)")
    if ancestors.dim() < 2:
        raise ValueError(f"ancestors: expected (T, ..., K), got shape {tuple(ancestors.shape)}")
    if indices is None:
        indices = torch.arange(ancestors.shape[-1], device=ancestors.device)
        indices = indices.expand(ancestors.shape[1:])
    require_tensor("indices", indices, "an int64 tensor (..., M)")
    return _trace_ancestors(ancestors, indices)  # type: ignore[no-any-return]


class Genealogy:
    """The ancestors of every step of a particle filter, and what its particles held.

    Attributes:
        ancestors: one ``(..., K)`` tensor a resample.
        trees: one tree of tensors ``(..., K, ...)`` a generation, or None where none was given.

    Args:
        tree: what the particles of the first generation hold; any nesting of tensors, as in
            :func:`gather_particles`.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import Genealogy
        >>> genealogy = Genealogy(torch.tensor([10, 11, 12]))
        >>> genealogy.append(torch.tensor([2, 2, 0]), torch.tensor([20, 21, 22]))
        >>> genealogy.trace()
        tensor([[2, 2, 0],
                [0, 1, 2]])
        >>> genealogy.paths()
        [tensor([12, 12, 10]), tensor([20, 21, 22])]
    """

    def __init__(self, tree: Any = None) -> None:
        self.ancestors: list[Tensor] = []
        self.trees: list[Any] = [tree]

    def append(self, ancestors: Tensor, tree: Any = None) -> None:
        """Records a resample, and what the particles of the new generation hold after their move.

        Args:
            ancestors: ``(..., K)`` int64, as :func:`resample` returns them.
            tree: of the new generation; None where :meth:`paths` is not asked for.

        Raises:
            ValueError: ``ancestors`` that is no int64 tensor of the shape of the earlier ones.
        """
        require_tensor("ancestors", ancestors, "an int64 tensor (..., K)")
        if ancestors.dtype != torch.int64 or ancestors.dim() == 0:
            raise ValueError(
                f"ancestors: expected an int64 tensor (..., K), got {ancestors.dtype} of shape "
                f"{tuple(ancestors.shape)}"
            )
        if self.ancestors and ancestors.shape != self.ancestors[0].shape:
            raise ValueError(
                f"ancestors: expected the shape of the earlier steps "
                f"{tuple(self.ancestors[0].shape)}, got {tuple(ancestors.shape)}"
            )
        self.ancestors.append(ancestors)
        self.trees.append(tree)

    def trace(self, indices: Tensor | None = None) -> Tensor:
        """:func:`trace_ancestors` of what was recorded: ``(T + 1, ..., M)``.

        Raises:
            ValueError: as :func:`trace_ancestors`, or nothing has been recorded.
        """
        if not self.ancestors:
            raise ValueError("ancestors: expected a recorded step, got an empty genealogy")
        return trace_ancestors(torch.stack(self.ancestors), indices)

    def paths(self, indices: Tensor | None = None) -> list[Any]:
        """What the ancestors of the surviving particles held: one gathered tree a generation.

        Raises:
            ValueError: as :meth:`trace`, or for a leaf whose shape does not fit.
        """
        lines = self.trace(indices)
        return [gather_particles(tree, line) for tree, line in zip(self.trees, lines, strict=True)]


def _round_seed(seed: Tensor, which: int) -> Tensor:
    """A seed of its own: multiples of an odd number differ, and far apart, for near seeds."""
    return seed * 0x5851F42D4C957F2D + which


def _exact(
    log_weights: Tensor,
    log_transition: Callable[[Tensor, Tensor], Tensor],
    successors: Tensor,
    seed: Tensor,
) -> Tensor:
    """One draw for each successor, from the weights of all particles given it."""
    particles = torch.arange(log_weights.shape[-1], device=log_weights.device)
    particles = particles.expand(*successors.shape, -1)
    log_moves = _log_moves(log_transition, particles, successors.unsqueeze(-1).expand_as(particles))
    joint = log_weights.unsqueeze(-2) + log_moves
    # One population a successor: its uniform is keyed by its place among them.
    populations = successors.shape[:-1].numel()
    u = _uniforms(seed, populations, successors.shape[-1]).reshape(*successors.shape, 1)
    return resample(joint, scheme="multinomial", num_samples=1, uniforms=u).ancestors.squeeze(-1)


def _log_moves(
    log_transition: Callable[[Tensor, Tensor], Tensor], particles: Tensor, successors: Tensor
) -> Tensor:
    log_moves = log_transition(particles, successors)
    if not isinstance(log_moves, Tensor) or log_moves.shape != particles.shape:
        got = tuple(log_moves.shape) if isinstance(log_moves, Tensor) else type(log_moves).__name__
        raise ValueError(
            f"log_transition: expected a tensor of the indices' shape {tuple(particles.shape)}, "
            f"got {got}"
        )
    return log_moves.detach()


def backward_sample(
    log_weights: Tensor,
    log_transition: Callable[[Tensor, Tensor], Tensor],
    successors: Tensor | None = None,
    *,
    log_bound: float | None = None,
    max_tries: int = 16,
    seed: SupportsIndex | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw, for particles of the next generation, one of this generation that they came from.

    Tracing ancestors, all paths soon meet in one particle. Backward sampling (Godsill, Doucet and
    West 2004) draws a parent anew, particle i with probability in proportion to
    :math:`w_i\, m(x_i \to x'_j)`, whoever the ancestor was: going from the last generation to the
    first, it draws whole paths from the smoothing distribution. With several draws a particle it is
    the backward step of PaRIS (Olsson and Westerborn 2017).

    Without ``log_bound`` every particle is weighed for every successor, ``O(K M)``. With one,
    parents are proposed from the weights and accepted with probability m / bound, which takes
    ``O(K + M)`` a round; who has none after ``max_tries`` rounds is drawn the first way, so that
    the time is bounded too (Dau and Chopin 2023). The law is the same.

    Args:
        log_weights: ``(..., K)`` weights of this generation before its resample; each leading index
            is an independent population. As in :func:`resample`.
        log_transition: called with two int64 tensors of one shape ``(..., M', J)``, particles of
            this generation and of the next; returns the log density of moving from one to the
            other, in that shape.
        successors: ``(..., M)`` int64 particles of the next generation, repeats allowed; by default
            one draw for each of K.
        log_bound: an upper bound of all log densities. A density beyond it counts as the bound.
        max_tries: rounds before the rest is drawn exactly.
        seed: as in :func:`resample`: the draws of a population depend on the seed, its linear index
            and its own particles alone.
        generator: where the seed is drawn from if none is given; by default torch's own.

    Returns:
        ``(..., M)`` int64 particles of this generation; any of them where none has weight, or none
        can have led to a successor.

    Raises:
        ValueError: wrong type, shape or option; the text names the argument.

    With ``log_bound``, whether anyone is left to draw is decided on the host: one synchronisation a
    round, so that part is for eager use.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import backward_sample
        >>> x, y = torch.tensor([0.0, 10.0]), torch.tensor([9.5, 0.5, 0.2])
        >>> def log_transition(i, j):
        ...     return -0.5 * (y[j] - x[i]) ** 2
        >>> backward_sample(torch.zeros(2), log_transition, torch.arange(3), seed=0)
        tensor([1, 0, 0])
    """
    log_weights = detached_weights(log_weights)
    if log_weights.dim() == 0:
        raise ValueError("log_weights: expected (..., K), got a scalar")
    if not callable(log_transition):
        raise ValueError(
            f"log_transition: expected a function, got {type(log_transition).__name__}"
        )
    if successors is None:
        successors = torch.arange(log_weights.shape[-1], device=log_weights.device)
        successors = successors.expand(log_weights.shape)
    require_tensor("successors", successors, "an int64 tensor (..., M)")
    if (
        successors.dim() == 0
        or successors.dtype != torch.int64
        or successors.shape[:-1] != log_weights.shape[:-1]
    ):
        raise ValueError(
            f"successors: expected int64 (..., M) for log_weights of shape "
            f"{tuple(log_weights.shape)}, got {successors.dtype} of shape {tuple(successors.shape)}"
        )
    if log_weights.shape[-1] == 0 and successors.numel() > 0:
        raise ValueError(
            "log_weights: expected at least one particle for successors of shape "
            f"{tuple(successors.shape)}, got shape {tuple(log_weights.shape)}"
        )
    tries = whole_number("max_tries", max_tries)
    if tries < 0:
        raise ValueError(f"max_tries: expected at least 0, got {tries}")
    if log_bound is not None and (not is_number(log_bound) or math.isnan(log_bound)):
        raise ValueError(f"log_bound: expected a number or None, got {log_bound!r}")
    key = check_seed(seed, generator)
    if key is None:
        key = torch.randint(2**63 - 1, (), generator=generator, device=log_weights.device)
    elif not isinstance(key, Tensor):
        key = torch.tensor(key, device=log_weights.device)
    if successors.numel() == 0:
        return torch.zeros_like(successors)
    if log_bound is None:
        return _exact(log_weights, log_transition, successors, key)
    return _accept_reject(log_weights, log_transition, successors, float(log_bound), tries, key)


def _accept_reject(
    log_weights: Tensor,
    log_transition: Callable[[Tensor, Tensor], Tensor],
    successors: Tensor,
    log_bound: float,
    max_tries: int,
    seed: Tensor,
) -> Tensor:
    populations = successors.shape[:-1].numel()
    parents = torch.zeros_like(successors)
    waiting = torch.ones_like(successors, dtype=torch.bool)
    for tries in range(max_tries + 1):
        left = int(waiting.sum(-1).max()) if waiting.numel() else 0
        if left == 0:
            break
        # Those that wait come first, in their order: a place depends on its own population alone.
        places = torch.argsort(~waiting, dim=-1, stable=True)[..., :left]
        some = successors.gather(-1, places)
        still = waiting.gather(-1, places)
        if tries == max_tries:
            drawn = _exact(log_weights, log_transition, some, _round_seed(seed, 2 * tries))
            accepted = still
        else:
            drawn = resample(
                log_weights,
                scheme="multinomial",
                num_samples=left,
                seed=_round_seed(seed, 2 * tries),
            ).ancestors
            log_moves = _log_moves(log_transition, drawn.unsqueeze(-1), some.unsqueeze(-1))
            u = _uniforms(_round_seed(seed, 2 * tries + 1), populations, left).reshape(some.shape)
            accepted = still & (u < (log_moves.squeeze(-1).double() - log_bound).exp())
        parents.scatter_(-1, places, torch.where(accepted, drawn, parents.gather(-1, places)))
        waiting.scatter_(-1, places, still & ~accepted)
    return parents


@register_fake("trace_ancestors")
def _(ancestors: Tensor, indices: Tensor) -> Tensor:
    check_same_device(ancestors=ancestors, indices=indices)
    return indices.new_empty((ancestors.shape[0] + 1, *indices.shape))


@register_fake("uniforms")
def _(seed: Tensor, rows: int, count: int) -> Tensor:
    if rows < 0 or count < 0:
        raise ValueError(f"rows, count: expected at least 0, got {rows} and {count}")
    return seed.new_empty((rows, count), dtype=torch.float64)

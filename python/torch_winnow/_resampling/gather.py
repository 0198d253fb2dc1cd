"""Moving particles: any tree of tensors follows the ancestors."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_winnow import _library  # noqa: F401  (registers the operators)

_gather_particles = torch.ops.winnow.gather_particles
_gather_particles_ = torch.ops.winnow.gather_particles_

Tree = TypeVar("Tree")


def _gather(state: Tensor, ancestors: Tensor, dim: int) -> Tensor:
    if state.requires_grad and torch.is_grad_enabled():
        return _differentiable_gather(state, ancestors, dim)
    return _gather_particles(state, ancestors, dim)  # type: ignore[no-any-return]


def _differentiable_gather(state: Tensor, ancestors: Tensor, dim: int) -> Tensor:
    # The same rows through an operator of torch that knows its derivative.
    dim = dim % state.dim()
    shape = ancestors.shape
    before = state.shape[: dim - len(shape) + 1]
    after = state.shape[dim + 1 :]
    index = ancestors.reshape([1] * len(before) + list(shape) + [1] * len(after))
    return state.gather(dim, index.expand(*before, *shape, *after))


def gather_particles(tree: Tree, ancestors: Tensor, dim: int | None = None) -> Tree:
    """New tensors in which slot j of each population holds the row of particle ``ancestors[j]``.

    Args:
        tree: a tensor, or any nesting of lists, tuples, dicts and the like with tensors as leaves
            (latents, scheduler history, caches); other leaves are passed on. A leaf has the shape
            ``(..., *populations, K, ...)`` where ``ancestors`` has ``(*populations, M)``: the
            population dimensions lie right before the particle dimension. Any dtype and strides.
        ancestors: ``(*populations, M)`` int64.
        dim: the particle dimension of every leaf; by default the one after as many population
            dimensions as ``ancestors`` has (0 for a single population).

    Returns:
        The same tree with M rows instead of K. Differentiable in its tensors.

    Raises:
        ValueError: a leaf whose shape does not fit, or an ancestor outside [0, K).

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import gather_particles
        >>> gather_particles({"x": torch.tensor([5, 6, 7])}, torch.tensor([2, 2, 0]))
        {'x': tensor([7, 7, 5])}
    """
    at = ancestors.dim() - 1 if dim is None else dim
    if isinstance(tree, Tensor):  # without the walk over a tree
        return cast(Tree, _gather(tree, ancestors, at))
    return cast(Tree, tree_map_only(Tensor, lambda leaf: _gather(leaf, ancestors, at), tree))


def gather_particles_(tree: Tree, ancestors: Tensor, dim: int | None = None) -> Tree:
    """:func:`gather_particles` in place: right for any ancestors, cycles included.

    Only rows that change are moved, with one chunk of a row as spare memory;
    ``resample(..., keep_slots=True)`` makes them the fewest.

    Args:
        tree: as in :func:`gather_particles`; its tensors are changed, views write to their base.
        ancestors: ``(*populations, K)`` int64, as many as there are particles.
        dim: as in :func:`gather_particles`.

    Returns:
        ``tree`` itself.

    Raises:
        ValueError: as :func:`gather_particles`; also a leaf that requires grad (a gather in place
            would lose the history) or an expanded one (its rows share memory).

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import gather_particles_
        >>> x = torch.tensor([5, 6, 7])
        >>> gather_particles_(x, torch.tensor([1, 2, 0]))
        tensor([6, 7, 5])
    """
    at = ancestors.dim() - 1 if dim is None else dim

    def move(leaf: Tensor) -> Tensor:
        if leaf.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "tree: expected tensors that do not require grad to gather in place, got one of "
                f"shape {tuple(leaf.shape)} that does; use gather_particles, or torch.no_grad()"
            )
        _gather_particles_(leaf, ancestors, at)
        return leaf

    if isinstance(tree, Tensor):
        move(tree)
    else:
        tree_map_only(Tensor, move, tree)
    return tree


@torch.library.register_fake("winnow::gather_particles")
def _(state: Tensor, ancestors: Tensor, dim: int) -> Tensor:
    shape = list(state.shape)
    shape[dim] = ancestors.shape[-1]
    return state.new_empty(shape)


@torch.library.register_fake("winnow::gather_particles_")
def _(state: Tensor, ancestors: Tensor, dim: int) -> None:
    return None

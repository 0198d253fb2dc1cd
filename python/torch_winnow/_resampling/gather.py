"""Moving particles: any tree of tensors follows the ancestors."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._resampling.memory import first_overlap, overlaps_itself
from torch_winnow._resampling.weights import require_tensor, whole_number

_gather_particles = torch.ops.winnow.gather_particles
_gather_particles_ = torch.ops.winnow.gather_particles_

Tree = TypeVar("Tree")


def _particle_dim(ancestors: Tensor, dim: int | None) -> int:
    require_tensor("ancestors", ancestors, "an int64 tensor (*populations, M)")
    return ancestors.dim() - 1 if dim is None else whole_number("dim", dim)


def gather_particles(tree: Tree, ancestors: Tensor, dim: int | None = None) -> Tree:
    """New tensors in which slot j of each population holds the row of particle ``ancestors[j]``.

    Args:
        tree: a tensor, or any nesting of lists, tuples, dicts and the like with tensors as leaves
            (latents, scheduler history, caches); other leaves are passed on, and so is, ungathered,
            a container that ``torch.utils._pytree`` does not know, such as a dataclass that is not
            registered there. A leaf has the shape ``(..., *populations, K, ...)`` where
            ``ancestors`` has ``(*populations, M)``: the population dimensions lie right before the
            particle dimension. Any dtype and strides.
        ancestors: ``(*populations, M)`` int64.
        dim: the particle dimension of every leaf; by default the one after as many population
            dimensions as ``ancestors`` has (0 for a single population).

    Returns:
        The same tree with M rows instead of K. Differentiable in its tensors.

    Raises:
        ValueError: ``ancestors`` that is no int64 tensor, a leaf whose shape does not fit, or an
            ancestor outside [0, K).

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import gather_particles
        >>> gather_particles({"x": torch.tensor([5, 6, 7])}, torch.tensor([2, 2, 0]))
        {'x': tensor([7, 7, 5])}
    """
    at = _particle_dim(ancestors, dim)
    if isinstance(tree, Tensor):  # without the walk over a tree
        return cast(Tree, _gather_particles(tree, ancestors, at))
    return cast(
        Tree, tree_map_only(Tensor, lambda leaf: _gather_particles(leaf, ancestors, at), tree)
    )


def gather_particles_(tree: Tree, ancestors: Tensor, dim: int | None = None) -> Tree:
    """:func:`gather_particles` in place: right for any ancestors, cycles included.

    Only rows that change are moved, with one chunk of a row as spare memory;
    ``resample(..., keep_slots=True)`` makes them the fewest. Every leaf is checked before the first
    one moves.

    Args:
        tree: as in :func:`gather_particles`; its tensors are changed, views write to their base. A
            tensor that occurs twice is moved once; leaves may be slices of one tensor that do not
            meet, such as the keys and values of a cache, and ``ancestors`` may be among them.
        ancestors: ``(*populations, K)`` int64, as many as there are particles.
        dim: as in :func:`gather_particles`.

    Returns:
        ``tree`` itself.

    Raises:
        ValueError: as :func:`gather_particles`; also a leaf that requires grad (a gather in place
            would lose the history), one whose rows share memory (an expanded one), or two that
            share memory in another way than above. Under ``torch.compile`` the memory of different
            leaves is not compared.

    Example:
        >>> import torch
        >>> from torch_winnow.resampling import gather_particles_
        >>> x = torch.tensor([5, 6, 7])
        >>> gather_particles_(x, torch.tensor([1, 2, 0]))
        tensor([6, 7, 5])
    """
    at = _particle_dim(ancestors, dim)
    if isinstance(tree, Tensor):  # without the walk over a tree
        _check_in_place(tree)
        _move(tree, ancestors, at)
        return tree
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    for leaf in leaves:
        _check_in_place(leaf)
    leaves, ancestors = _apart(leaves, ancestors)
    # The operator refuses a leaf that does not fit: it comes before the others have moved.
    fits = [_fits(leaf, ancestors, at) for leaf in leaves]
    for wanted in (False, True):
        for leaf, fit in zip(leaves, fits, strict=True):
            if fit == wanted:
                _move(leaf, ancestors, at)
    return tree


def _check_in_place(leaf: Tensor) -> None:
    if leaf.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "tree: expected tensors that do not require grad to gather in place, got one of "
            f"shape {tuple(leaf.shape)} that does; use gather_particles, or torch.no_grad()"
        )
    if leaf.layout != torch.strided:
        raise ValueError(f"tree: expected strided tensors to gather in place, got {leaf.layout}")
    if overlaps_itself(leaf):
        raise ValueError(
            "tree: expected memory of its own to gather in place, got a tensor of shape "
            f"{tuple(leaf.shape)} with strides {leaf.stride()}, whose elements share memory"
        )


def _apart(leaves: list[Tensor], ancestors: Tensor) -> tuple[list[Tensor], Tensor]:
    """Every memory once, and ancestors that no move changes."""
    if torch.compiler.is_compiling():  # there are no addresses
        distinct: list[Tensor] = []
        for leaf in leaves:
            if not any(leaf is other for other in distinct):
                distinct.append(leaf)
        may_hold = len(distinct) > 1 and any(leaf.dtype == torch.int64 for leaf in distinct)
        return distinct, ancestors.clone() if may_hold else ancestors
    distinct = list(
        {(leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride()): leaf for leaf in leaves}.values()
    )
    shared = first_overlap(distinct)
    if shared is not None:
        raise ValueError(
            "tree: expected leaves that do not share memory to gather in place, got two of shapes "
            f"{tuple(shared[0].shape)} and {tuple(shared[1].shape)} that do; pass one of them"
        )
    storage = ancestors.untyped_storage().data_ptr()
    if any(leaf.untyped_storage().data_ptr() == storage for leaf in distinct):
        ancestors = ancestors.clone()
    return distinct, ancestors


def _fits(leaf: Tensor, ancestors: Tensor, dim: int) -> bool:
    end = 1 + (dim + leaf.dim() if dim < 0 else dim)
    start = end - ancestors.dim()
    return start >= 0 and leaf.shape[start:end] == ancestors.shape and leaf.device.type == "cpu"


def _move(leaf: Tensor, ancestors: Tensor, dim: int) -> None:
    compiling = torch.compiler.is_compiling()
    # Lazily conjugated or negated, the memory holds other numbers than the tensor; a compiler does
    # not tell.
    if leaf.is_complex() if compiling else leaf.is_conj() or leaf.is_neg():
        plain = leaf.resolve_conj().resolve_neg()
        _gather_particles_(plain, ancestors, dim)
        leaf.copy_(plain)
        return
    _gather_particles_(leaf, ancestors, dim)
    # Autograd has to see that what it saved for a backward pass has changed.
    if not compiling:
        torch.autograd.graph.increment_version(leaf)


def _save_ancestors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    state, ancestors, dim = inputs
    ctx.save_for_backward(ancestors)
    ctx.dim = dim % state.dim()
    ctx.particles = state.shape[ctx.dim]


def _gather_particles_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    """Every particle receives the sum over its offspring, added in the order of their slots."""
    (ancestors,) = ctx.saved_tensors
    leading = ancestors.dim() - 1
    populations = ancestors.shape[:-1]
    lead = tuple(range(ctx.dim - leading, ctx.dim + 1))
    front = tuple(range(leading + 1))
    rows = grad.movedim(lead, front)
    rest = rows.shape[leading + 1 :]
    offset = torch.arange(populations.numel(), device=grad.device) * ctx.particles
    index = ancestors + offset.reshape(*populations, 1)
    total = rows.new_zeros((populations.numel() * ctx.particles, *rest))
    total = total.index_add(0, index.reshape(-1), rows.reshape(-1, *rest))
    return total.reshape(*populations, ctx.particles, *rest).movedim(front, lead), None, None


torch.library.register_autograd(
    "winnow::gather_particles", _gather_particles_backward, setup_context=_save_ancestors
)


@register_fake("gather_particles")
def _(state: Tensor, ancestors: Tensor, dim: int) -> Tensor:
    check_same_device(state=state, ancestors=ancestors)
    shape = list(state.shape)
    shape[dim] = ancestors.shape[-1]
    return state.new_empty(shape)


@register_fake("gather_particles_")
def _(state: Tensor, ancestors: Tensor, dim: int) -> None:
    check_same_device(state=state, ancestors=ancestors)

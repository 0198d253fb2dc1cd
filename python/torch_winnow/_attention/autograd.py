"""Gradients: each backward is one operator on the forward's inputs, results and options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._arguments import check_tensors


def check_operands(name: str, **operands: Tensor) -> None:
    """Refuses what the dispatcher would let through or explain badly.

    Raises:
        ValueError: an operand is not a tensor.
        NotImplementedError: an operand carries a tangent. The operators have no forward-mode
            derivative, and a registered gradient does not make PyTorch say so: the result would
            be a constant.
    """
    check_tensors(**operands)
    # A module variable of PyTorch, -1 outside of forward mode: the calls below cost far more.
    if forward_ad._current_level >= 0 and any(map(_has_tangent, operands.values())):
        raise NotImplementedError(
            f"{name}: forward-mode differentiation (torch.func.jvp, torch.func.jacfwd, "
            "torch.autograd.forward_ad) is not implemented. Use reverse mode (backward or "
            "torch.autograd.grad), or the slower definition of the same name in "
            "torch_winnow.reference.attention, which serves both"
        )


def _has_tangent(tensor: Tensor) -> bool:
    # What torch.func wraps may hide the tangent of another of its transforms: all of it counts.
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _differentiable(name: str, tensors: int) -> None:
    """Registers ``<name>_backward`` as the gradient of ``name``, whose first inputs are tensors."""
    backward_op = getattr(torch.ops.winnow, f"{name}_backward")

    # Tensors among the options (cu_seqlens) are saved like the others, last: autograd then notices
    # when one is changed in place before the backward.
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.options = [
            None if isinstance(option, Tensor) else option for option in inputs[tensors:]
        ]
        ctx.places = [i for i, option in enumerate(inputs[tensors:]) if isinstance(option, Tensor)]
        further = [inputs[tensors + i] for i in ctx.places]
        ctx.save_for_backward(*inputs[:tensors], *output, *further)

    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        check_operands(name, grad_out=grad_out, grad_lse=grad_lse)
        saved, options = ctx.saved_tensors, list(ctx.options)
        for place, option in zip(ctx.places, saved[tensors + 2 :], strict=True):
            options[place] = option
        grads = backward_op(grad_out, grad_lse, *saved[: tensors + 2], *options)
        return (*grads, *(None for _ in options))

    torch.library.register_autograd(f"winnow::{name}", backward, setup_context=save)
    _not_differentiable(name)


def _not_differentiable(name: str) -> None:
    """Without this, autograd would treat ``<name>_backward`` as a constant after a mere warning."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name} is differentiable once: its second derivative is not implemented "
            "(was create_graph=True intended?)"
        )

    torch.library.register_autograd(f"winnow::{name}_backward", refuse)


def _save_merge(
    ctx: Any, inputs: tuple[Sequence[Tensor], Sequence[Tensor]], output: tuple[Tensor, Tensor]
) -> None:
    outs, lses = inputs
    ctx.save_for_backward(*outs, *lses, *output)


def _merge_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, Any]:
    check_operands("merge_attention", grad_out=grad_out, grad_lse=grad_lse)
    *parts, out, lse = ctx.saved_tensors
    half = len(parts) // 2
    grad_outs, grad_lses = torch.ops.winnow.merge_attention_backward(
        grad_out, grad_lse, parts[:half], parts[half:], out, lse
    )
    return list(grad_outs.unbind(0)), list(grad_lses.unbind(0))


_differentiable("cat_attention", tensors=3)
_differentiable("block_diagonal_attention", tensors=3)
_differentiable("chunk_attention", tensors=5)
torch.library.register_autograd(
    "winnow::merge_attention", _merge_backward, setup_context=_save_merge
)
_not_differentiable("merge_attention")

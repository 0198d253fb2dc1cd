"""Chunked compress-and-attend attention.

A sequence is cut into chunks; a compressor maps each chunk to a vector; a token then attends to the
vectors of earlier chunks and to the tokens of its own chunk so far (the Compress & Attend
Transformer, arXiv 2511.05313). The cost per token is ``C + N/C`` keys instead of ``N``.

Which function for what:

- :func:`cat_attention`: vectors and tokens interleaved in one sequence, as the paper trains it.
- :func:`chunk_attention`: tokens and vectors ("slots") as two tensors; several vectors per chunk, a
  window of raw tokens (``lookback``), packed sequences (``cu_seqlens``).
- :func:`block_diagonal_attention`: every chunk by itself, the compressor's attention.
- :func:`merge_attention`: one softmax out of partial results over disjoint keys.

Positions (RoPE) are applied by the caller, before. All functions are differentiable once, through
the returned ``lse`` too, and give the same bits for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)

__all__ = ["block_diagonal_attention", "cat_attention", "chunk_attention", "merge_attention"]

# Bound once: a look-up through torch.ops costs as much as a small op.
_cat_attention = torch.ops.winnow.cat_attention
_chunk_attention = torch.ops.winnow.chunk_attention
_block_diagonal_attention = torch.ops.winnow.block_diagonal_attention
_merge_attention = torch.ops.winnow.merge_attention


@overload
def cat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def cat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def cat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the Compress & Attend Transformer in its interleaved layout.

    Each block of ``block_size`` rows begins with the vector of the chunks before it, its tokens
    follow. Row j may attend row i iff ``i <= j`` and (``i // block_size == j // block_size`` or
    ``i % block_size == 0``): the rows of the own block so far, and the vector rows of all earlier
    blocks. The last block may be short. (arXiv 2511.05313, section 3.)

    Args:
        query: ``(B, Hq, S, D)``, D from 1 to 256; float32, bfloat16, float16 or float64. Here
            and below any strides with a contiguous last dimension, without a copy.
        key: ``(B, Hkv, S, D)`` of the same dtype; ``Hkv`` divides ``Hq``.
        value: as ``key``.
        block_size: rows per block, one vector and its tokens.
        scale: factor of the scores, ``D**-0.5`` by default.
        return_lse: also return the natural log of each row's sum of exponentials.

    Returns:
        ``(B, Hq, S, D)`` in the query's dtype; with ``return_lse`` a pair with ``(B, Hq, S)``
        float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or options that do not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from torch_winnow.attention import cat_attention
        >>> q, k, v = torch.randn(3, 1, 4, 99, 16).unbind(0)
        >>> cat_attention(q, k, v, block_size=33).shape
        torch.Size([1, 4, 99, 16])
    """
    out, lse = _cat_attention(query, key, value, block_size, scale)
    return (out, lse) if return_lse else out


@overload
def chunk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    *,
    chunk_size: int,
    slots_per_chunk: int = ...,
    initial_slots: int = ...,
    lookback: int = ...,
    scale: float | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def chunk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    *,
    chunk_size: int,
    slots_per_chunk: int = ...,
    initial_slots: int = ...,
    lookback: int = ...,
    scale: float | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def chunk_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    *,
    chunk_size: int,
    slots_per_chunk: int = 1,
    initial_slots: int = 1,
    lookback: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a prefix of slots and to a run of tokens, under one softmax.

    Token t of chunk ``i = t // chunk_size`` sees the slots
    ``[0, min(M, initial_slots + i * slots_per_chunk))`` and the tokens
    ``[max(0, (i - lookback) * chunk_size), t]``. With the defaults slot 0 is a learned dummy and
    slot n + 1 the compression of chunk n, so that no token sees its own chunk's vector. **Whether
    that is causal depends on what the slots hold:** slots that chunk i may see must be computed
    from tokens before it.

    Args:
        query: ``(B, Hq, N, D)``, D from 1 to 256; float32, bfloat16, float16 or float64. Here
            and below any strides with a contiguous last dimension, without a copy.
        key: ``(B, Hkv, N, D)`` of the same dtype; ``Hkv`` divides ``Hq``.
        value: as ``key``.
        slot_key: ``(B, Hkv, M, D)``; slots beyond those that are visible are never read.
        slot_value: as ``slot_key``.
        chunk_size: tokens per chunk; the last chunk may be short.
        slots_per_chunk: slots that each further chunk sees more, at least 1.
        initial_slots: slots that the first chunk sees, at least 0.
        lookback: earlier chunks whose tokens are visible too.
        scale: factor of the scores, ``D**-0.5`` by default.
        cu_seqlens: ``(S + 1,)`` int32 or int64 on the CPU, ascending from 0 to N, for B = 1: where
            each of S packed sequences begins. Chunks restart there; the slots of the sequences lie
            one after another, ``initial_slots + (ceil(len / chunk_size) - 1) * slots_per_chunk``
            each (``initial_slots`` for an empty sequence).
        return_lse: also return the natural log of each row's sum of exponentials.

    Returns:
        ``(B, Hq, N, D)`` in the query's dtype; with ``return_lse`` a pair with ``(B, Hq, N)``
        float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or options that do not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from torch_winnow.attention import chunk_attention
        >>> q, k, v = torch.randn(3, 1, 4, 100, 16).unbind(0)
        >>> slot_k, slot_v = torch.randn(2, 1, 4, 4, 16).unbind(0)
        >>> chunk_attention(q, k, v, slot_k, slot_v, chunk_size=32).shape
        torch.Size([1, 4, 100, 16])
    """
    out, lse = _chunk_attention(
        query,
        key,
        value,
        slot_key,
        slot_value,
        chunk_size,
        slots_per_chunk,
        initial_slots,
        lookback,
        scale,
        cu_seqlens,
    )
    return (out, lse) if return_lse else out


@overload
def block_diagonal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def block_diagonal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def block_diagonal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each block of ``block_size`` rows attends only to itself; the last block may be short.

    The attention of a compressor that maps chunks to vectors: all chunks of a sequence in one call,
    without reshaping and without padding.

    Args:
        query: ``(B, Hq, N, D)``, D from 1 to 256; float32, bfloat16, float16 or float64. Here
            and below any strides with a contiguous last dimension, without a copy.
        key: ``(B, Hkv, N, D)`` of the same dtype; ``Hkv`` divides ``Hq``.
        value: as ``key``.
        block_size: rows per block.
        causal: a row sees the rows of its block up to itself, instead of all of them.
        scale: factor of the scores, ``D**-0.5`` by default.
        return_lse: also return the natural log of each row's sum of exponentials.

    Returns:
        ``(B, Hq, N, D)`` in the query's dtype; with ``return_lse`` a pair with ``(B, Hq, N)``
        float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or options that do not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from torch_winnow.attention import block_diagonal_attention
        >>> x = torch.randn(2, 1, 50, 8)
        >>> x_0 = x[:, :, :17]
        >>> first = block_diagonal_attention(x_0, x_0, x_0, block_size=17)
        >>> torch.equal(block_diagonal_attention(x, x, x, block_size=17)[:, :, :17], first)
        True
    """
    out, lse = _block_diagonal_attention(query, key, value, block_size, causal, scale)
    return (out, lse) if return_lse else out


def merge_attention(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint sets of keys into attention over their union.

    ``lse = log sum_p exp(lse_p)`` and ``out = sum_p exp(lse_p - lse) out_p``. A partial result with
    ``lse_p = -inf`` saw nothing and counts for nothing, whatever its row holds; where none saw
    anything the result is zeros and ``-inf``.

    Args:
        outs: partial outputs ``(..., N, D)`` of one floating dtype, as a sequence or stacked along
            the first dimension.
        lses: their ``(..., N)`` natural-log sums of exponentials, float32 (float64 for float64).

    Returns:
        The pair ``(out, lse)`` with the shape and dtype of one partial result.

    Raises:
        ValueError: no parts, or parts that do not fit together; the message names the argument.

    Example:
        >>> import torch
        >>> from torch_winnow.attention import merge_attention
        >>> out, lse = merge_attention([torch.zeros(1, 2), torch.ones(1, 2)], torch.zeros(2, 1))
        >>> out
        tensor([[0.5000, 0.5000]])
    """
    outs = outs.unbind(0) if isinstance(outs, Tensor) else outs
    lses = lses.unbind(0) if isinstance(lses, Tensor) else lses
    if len(outs) == 0:  # an operator without a tensor has no device to be dispatched to
        raise ValueError("outs: expected at least one partial result, got none")
    return _merge_attention(outs, lses)  # type: ignore[no-any-return]


# Fake kernels: shapes and dtypes only; the kernels check the arguments.


def _fake_forward(query: Tensor) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=statistics)


def _contiguous_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


@torch.library.register_fake("winnow::cat_attention")
def _(
    query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float | None
) -> tuple[Tensor, Tensor]:
    return _fake_forward(query)


@torch.library.register_fake("winnow::chunk_attention")
def _(query: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _fake_forward(query)


@torch.library.register_fake("winnow::block_diagonal_attention")
def _(query: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _fake_forward(query)


@torch.library.register_fake("winnow::merge_attention")
def _(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return _fake_forward(outs[0])


@torch.library.register_fake("winnow::cat_attention_backward")
@torch.library.register_fake("winnow::block_diagonal_attention_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    return _contiguous_like(query, key, value)


@torch.library.register_fake("winnow::chunk_attention_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slot_key: Tensor,
    slot_value: Tensor,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    return _contiguous_like(query, key, value, slot_key, slot_value)


@torch.library.register_fake("winnow::merge_attention_backward")
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    return out.new_empty((len(outs), *out.shape)), lse.new_empty((len(outs), *lse.shape))


# Autograd: each backward is one operator on the forward's inputs, results and options.


def _differentiable(name: str, tensors: int) -> None:
    """Registers ``<name>_backward`` as the gradient of ``name``, whose first inputs are tensors."""
    backward_op = getattr(torch.ops.winnow, f"{name}_backward")

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:tensors], *output)
        ctx.options = inputs[tensors:]

    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        grads = backward_op(grad_out, grad_lse, *ctx.saved_tensors, *ctx.options)
        return (*grads, *(None for _ in ctx.options))

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

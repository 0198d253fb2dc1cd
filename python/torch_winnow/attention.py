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
the returned ``lse`` too, in reverse mode only (forward mode is refused), and give the same bits for
any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from torch_winnow._attention import fakes  # noqa: F401  (registers the fake kernels)
from torch_winnow._attention.autograd import check_operands

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
@overload
def cat_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    scale: float | None = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    check_operands("cat_attention", query=query, key=key, value=value)
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
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
        cu_seqlens: ``(S + 1,)`` int32 or int64 on the query's device, ascending from 0 to N, for
            B = 1: where each of S packed sequences begins. Other values are refused on the CPU and
            brought into range on a GPU. Chunks restart at each; the slots of the sequences lie one
            after another, ``initial_slots + (ceil(len / chunk_size) - 1) * slots_per_chunk`` each
            (``initial_slots`` for an empty sequence).
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
    check_operands(
        "chunk_attention",
        query=query,
        key=key,
        value=value,
        slot_key=slot_key,
        slot_value=slot_value,
        **({} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}),
    )
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
@overload
def block_diagonal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    check_operands("block_diagonal_attention", query=query, key=key, value=value)
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
    outs, lses = _parts("outs", outs), _parts("lses", lses)
    if len(outs) == 0:  # an operator without a tensor has no device to be dispatched to
        raise ValueError("outs: expected at least one partial result, got none")
    return _merge_attention(outs, lses)  # type: ignore[no-any-return]


def _parts(argument: str, parts: Sequence[Tensor] | Tensor) -> Sequence[Tensor]:
    if isinstance(parts, Tensor) and parts.dim() > 0:
        check_operands("merge_attention", **{argument: parts})
        return parts.unbind(0)
    if not isinstance(parts, list | tuple):
        raise ValueError(
            f"{argument}: expected a list or tuple of tensors, or a tensor with the parts along "
            f"its first dimension, got {_came(parts)}"
        )
    check_operands("merge_attention", **{f"{argument}[{i}]": part for i, part in enumerate(parts)})
    return parts


def _came(value: object) -> str:
    return "a tensor without dimensions" if isinstance(value, Tensor) else type(value).__name__

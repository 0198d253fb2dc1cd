"""How much attention each stored key receives; public in :mod:`torch_winnow.kvcache`."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._kvcache.arguments import check_tensors, refuse_gradients
from torch_winnow._kvcache.attention import paged_attention

# Bound once: a look-up through torch.ops costs as much as a small op.
_attention_mass = torch.ops.winnow.attention_mass


def attention_mass(
    query: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    lse: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    key_scales: Tensor | None = None,
) -> Tensor:
    """The probability that each stored key receives, summed over queries and heads of its group.

    What eviction policies vote with: the column sums of the attention matrix, which is never
    written down. Queries stand at the last ``T`` positions of each row and see what
    :func:`paged_attention` with the same arguments lets them see. The same for any number of
    threads, bitwise.

    Args:
        query: ``(B, Hq, T, D)`` as in :func:`paged_attention`.
        key_pages: ``(num_blocks, Hkv, block_size, D)``.
        block_table: ``(B, max_blocks)`` int32.
        seq_lens: ``(B,)`` int32.
        lse: ``(B, Hq, T)`` as :func:`paged_attention` returns it for the same query and mask, which
            saves a pass over the keys. Default: computed here.
        causal, window, sinks, key_bias, scale: as in :func:`paged_attention`.
        key_scales: ``(num_blocks, Hkv)`` float32, those of quantised pages, whose blocks become
            float32 for this, in memory that is given back at the end.

    Returns:
        ``(B, Hkv, max_blocks * block_size)`` float32 (float64 for float64), by position; 0 for
        positions that nobody sees. Each query adds 1 to its row in all, or 0 if it sees nothing.

    Raises:
        ValueError: as :func:`paged_attention`, and on an lse of another shape or dtype.

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import attention_mass
        >>> pages = torch.zeros(1, 1, 4, 2)  # equal keys share the attention
        >>> table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3]).int()
        >>> attention_mass(torch.ones(1, 2, 2, 2), pages, table, lengths)
        tensor([[[1.6667, 1.6667, 0.6667, 0.0000]]])
    """
    refuse_gradients(query=query, key_pages=key_pages, lse=lse, key_bias=key_bias)
    optional = {"lse": lse, "key_bias": key_bias, "key_scales": key_scales}
    optional = {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_tensors(query=query, key_pages=key_pages, block_table=block_table, **optional)
    quantised = key_pages.dtype in (torch.int8, torch.float8_e4m3fn)
    if (key_scales is not None) != quantised:
        raise ValueError(
            "key_scales: expected those of quantised pages (int8 or float8_e4m3fn) and None of "
            f"others, got {'None' if key_scales is None else 'a tensor'} for {key_pages.dtype}"
        )
    if key_scales is not None:
        query, key_pages, block_table, key_bias = _dequantised(
            query, key_pages, block_table, key_bias, key_scales
        )
    if lse is None:
        # Attention to values of no dimensions: one read of the keys.
        _, lse = paged_attention(
            query,
            key_pages,
            key_pages[..., :0],
            block_table,
            seq_lens,
            causal=causal,
            window=window,
            sinks=sinks,
            key_bias=key_bias,
            scale=scale,
            return_lse=True,
        )
    if key_bias is not None:
        key_bias = key_bias.to(lse.dtype).broadcast_to(key_pages.shape[:3])
    return _attention_mass(  # type: ignore[no-any-return]
        query, key_pages, block_table, seq_lens, lse, causal, window, sinks, key_bias, scale
    )


def _dequantised(
    query: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    key_bias: Tensor | None,
    key_scales: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The query, and the blocks that the table names, in float32; the table and bias of those."""
    if query.dtype == torch.float64:
        raise ValueError(
            "query: expected float32, bfloat16 or float16 over quantised pages, got float64"
        )
    if key_scales.shape != key_pages.shape[:2] or key_scales.dtype != torch.float32:
        raise ValueError(
            f"key_scales: expected (num_blocks, Hkv) = {tuple(key_pages.shape[:2])} float32 as in "
            f"the pages, got {tuple(key_scales.shape)} of {key_scales.dtype}"
        )
    present = (block_table >= 0) & (block_table < len(key_pages))
    named = torch.where(present, block_table, 0).flatten().long()
    numbers = key_pages[named].float() * key_scales[named][..., None, None]
    places = torch.arange(named.numel(), dtype=torch.int32, device=block_table.device)
    table = torch.where(present, places.view(block_table.shape), -1)
    if key_bias is not None:
        key_bias = key_bias.broadcast_to(key_pages.shape[:3])[named]
    return query.float(), numbers, table, key_bias


@register_fake("attention_mass")
def _(
    query: Tensor,
    key_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    lse: Tensor,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    check_same_device(query=query, key_pages=key_pages, block_table=block_table)
    check_same_device(query=query, seq_lens=seq_lens, lse=lse, key_bias=key_bias)
    tokens = block_table.shape[1] * key_pages.shape[2]
    return query.new_empty(query.shape[0], key_pages.shape[1], tokens, dtype=lse.dtype)

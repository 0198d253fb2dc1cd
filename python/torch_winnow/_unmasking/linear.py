"""Statistics of logits that are never written down, from the hidden states before them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._unmasking.logit_stats import (
    BLOCK,
    LogitStats,
    as_stats,
    check_tensor,
    empty_statistics,
    id_tensor,
    is_raw,
    seed_tensor,
)

_linear_logit_stats = torch.ops.winnow.linear_logit_stats
_logit_stats = torch.ops.winnow.logit_stats
_merge_logit_stats = torch.ops.winnow.merge_logit_stats

# The share of the logits that is held at once; the copy of gathered rows takes hidden_size /
# vocabulary more.
_SHARE = 0.017


def linear_logit_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    suppress_ids: Tensor | Sequence[int] | None = None,
    target_ids: Tensor | None = None,
    statistics: str = "processed",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    shift: bool = False,
    **unavailable: object,
) -> LogitStats:
    """:func:`logit_stats` of ``hidden @ weight.T + bias``, a tile of the vocabulary at a time.

    The logits are never held together: a tile of 1.7% of the vocabulary (at least 1024 tokens) is
    multiplied, measured and forgotten, and the tiles' statistics are merged as by
    :func:`merge_logit_stats`. What comes out is what :func:`logit_stats` makes of the same logits;
    those of a matrix product of another shape may differ in their last bits. A draw is the same
    draw. On the CPU only the rows where ``mask`` is true are multiplied; on a GPU, which is never
    waited for, all of them. Memory beyond the arguments stays
    under 5% of the logits for vocabularies of more than 60000 tokens and 40 times the hidden size.

    Args:
        hidden: ``(..., E)`` float32, bfloat16 or float16.
        weight: ``(V, E)`` like ``hidden``, the output embedding.
        bias: ``(V,)`` like ``hidden``.
        mask, temperature, suppress_ids, target_ids, statistics, seed, generator, shift: as in
            :func:`logit_stats`.

    Returns:
        :class:`LogitStats`, each ``(...)``.

    Raises:
        ValueError: for a wrong shape, dtype or option; for ``top_k``, ``top_p`` and ``min_p``,
            which depend on all logits at once, and for ``previous_logits``,
            ``unconditional_logits`` and ``cfg_scale``, which would need the logits themselves.

    Example:
        >>> import torch
        >>> from torch_winnow.unmasking import linear_logit_stats, logit_stats
        >>> hidden, weight = torch.eye(2, 3), torch.arange(12.0).view(4, 3)
        >>> linear_logit_stats(hidden, weight).argmax, logit_stats(hidden @ weight.T).argmax
        (tensor([3, 3]), tensor([3, 3]))
    """
    for name, value in unavailable.items():
        if name in ("top_k", "top_p", "min_p"):
            if value is None:
                continue
            raise ValueError(
                f"{name}: expected None, because what is kept of a tile of the vocabulary depends "
                f"on the others, got {value!r}; use logit_stats(hidden @ weight.T)"
            )
        if name in ("previous_logits", "unconditional_logits", "cfg_scale", "vocab_start"):
            if value is None or (name == "cfg_scale" and value == 0.0):
                continue
            raise ValueError(f"{name}: needs the logits themselves; use logit_stats")
        raise TypeError(f"linear_logit_stats() got an unexpected keyword argument {name!r}")
    for name, value in (
        ("hidden", hidden),
        ("weight", weight),
        ("bias", bias),
        ("mask", mask),
        ("target_ids", target_ids),
    ):
        if value is not None or name in ("hidden", "weight"):
            check_tensor(name, value)
    _check(hidden, weight, bias, shift)
    statistic = _linear_logit_stats(
        hidden.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        mask,
        temperature,
        id_tensor(suppress_ids, hidden),
        target_ids,
        seed_tensor(seed, generator),
        is_raw(statistics),
        shift,
    )
    return as_stats(statistic, target_ids is not None, False)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, shift: bool) -> None:
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden: expected float32, bfloat16 or float16, got {hidden.dtype}")
    if hidden.dim() < (2 if shift else 1):
        wanted = "(..., L, E) with shift" if shift else "(..., E)"
        raise ValueError(f"hidden: expected {wanted}, got {tuple(hidden.shape)}")
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight: expected (V, {width}) {hidden.dtype} as in hidden, got "
            f"{tuple(weight.shape)} {weight.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != hidden.dtype):
        raise ValueError(
            f"bias: expected ({weight.shape[0]},) {hidden.dtype} as in weight, got "
            f"{tuple(bias.shape)} {bias.dtype}"
        )


def _checked_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    target_ids: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Hidden states, mask and targets, one row after the other."""
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    check_same_device(hidden=hidden, weight=weight, bias=bias, mask=mask)
    _check(hidden, weight, bias, False)
    shape = hidden.shape[:-1]
    for name, ids, dtype in (("mask", mask, torch.bool), ("target_ids", target_ids, torch.int64)):
        if ids is not None and (ids.shape != shape or ids.dtype != dtype):
            raise ValueError(
                f"{name}: expected {tuple(shape)} {dtype} as in hidden, got {tuple(ids.shape)} "
                f"{ids.dtype}"
            )
    rows = hidden.reshape(shape.numel(), hidden.shape[-1])
    target = None if target_ids is None else target_ids.reshape(-1)
    return rows, None if mask is None else mask.reshape(-1), target


def _selected(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    suppress_ids: Tensor | None,
    target_ids: Tensor | None,
    seed: Tensor | None,
    raw: bool,
    shift: bool,
) -> tuple[Tensor, ...]:
    """Multiplies the rows that count alone."""
    rows, counts, target = _checked_rows(hidden, weight, bias, mask, target_ids)
    shape, vocab = hidden.shape[:-1], weight.shape[0]
    if suppress_ids is not None and suppress_ids.dtype == torch.int64 and suppress_ids.numel() > 0:
        low, high = int(suppress_ids.min()), int(suppress_ids.max())
        if low < 0 or high >= vocab:
            raise ValueError(
                f"suppress_ids: expected ids in [0, {vocab}), got {low if low < 0 else high}"
            )
    keys = torch.arange(rows.shape[0])
    if counts is not None:
        keys = counts.nonzero()[:, 0]
        target = None if target is None else target[keys]
    if target is not None and ((target < 0) | (target >= vocab)).any():
        wrong = target[(target < 0) | (target >= vocab)][0].item()
        raise ValueError(
            f"target_ids: expected ids in [0, {vocab}) where mask is true, got {wrong}"
        )
    if shift:
        rows = rows[torch.where(keys % shape[-1] > 0, keys - 1, keys)]
    elif mask is not None:
        rows = rows[keys]
    merged = _merged_tiles(
        rows, weight, bias, None, temperature, suppress_ids, target, seed, raw, keys
    )
    if mask is None:
        return _like_rows(merged, shape, target is not None)
    empty = empty_statistics(hidden, tuple(shape), target_ids is not None, False)
    for whole, part, skipped in zip(empty, merged, (-1, *[0] * 8), strict=True):
        if whole.shape == shape:
            whole.fill_(skipped).view(-1)[keys] = part
    return empty


def _all_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    suppress_ids: Tensor | None,
    target_ids: Tensor | None,
    seed: Tensor | None,
    raw: bool,
    shift: bool,
) -> tuple[Tensor, ...]:
    """Multiplies every row: how many count is not known without synchronising."""
    rows, counts, target = _checked_rows(hidden, weight, bias, mask, target_ids)
    shape = hidden.shape[:-1]
    keys = torch.arange(rows.shape[0], device=hidden.device)
    if shift:
        rows = rows[torch.where(keys % shape[-1] > 0, keys - 1, keys)]
    merged = _merged_tiles(
        rows, weight, bias, counts, temperature, suppress_ids, target, seed, raw, keys
    )
    return _like_rows(merged, shape, target is not None)


def _like_rows(
    merged: tuple[Tensor, ...], shape: torch.Size, has_target: bool
) -> tuple[Tensor, ...]:
    """Without a target its statistic, and always the divergence, are absent and stay empty."""
    present = len(merged) - (1 if has_target else 2)
    return (*(statistic.reshape(shape) for statistic in merged[:present]), *merged[present:])


def _merged_tiles(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    suppress_ids: Tensor | None,
    target: Tensor | None,
    seed: Tensor | None,
    raw: bool,
    keys: Tensor,
) -> tuple[Tensor, ...]:
    vocab = weight.shape[0]
    width = BLOCK * max(1, int(_SHARE * vocab) // BLOCK)
    starts = list(range(0, vocab, width)) or [0]
    parts, counts = [], []
    logits = rows.new_empty(rows.shape[0] * min(width, vocab))
    for start in starts:
        columns = weight[start : start + width]
        count = columns.shape[0]
        tile = logits[: rows.shape[0] * count].view(rows.shape[0], count)
        if bias is None:
            torch.mm(rows, columns.T, out=tile)
        else:
            torch.addmm(bias[start : start + width], rows, columns.T, out=tile)
        *_, blocks = _logit_stats(
            tile, mask, temperature, suppress_ids, target, None, None, 0.0, None, None, None,
            seed, raw, start, False, keys,
        )  # fmt: skip
        parts.append(blocks)
        counts.append(count)
    merged = _merge_logit_stats(
        parts, starts, counts, temperature, seed, raw, target is not None, False, keys
    )
    return tuple(merged)


torch.library.impl("winnow::linear_logit_stats", "CPU", func=_selected)
torch.library.impl("winnow::linear_logit_stats", "CUDA", func=_all_rows)


@register_fake("linear_logit_stats")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    suppress_ids: Tensor | None,
    target_ids: Tensor | None,
    seed: Tensor | None,
    raw: bool,
    shift: bool,
) -> tuple[Tensor, ...]:
    check_same_device(hidden=hidden, weight=weight, bias=bias, mask=mask)
    check_same_device(hidden=hidden, suppress_ids=suppress_ids, target_ids=target_ids, seed=seed)
    return empty_statistics(hidden, tuple(hidden.shape[:-1]), target_ids is not None, False)

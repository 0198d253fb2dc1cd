"""Which tokens a cache keeps, voted by attention; public in :mod:`torch_winnow.kvcache`."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_winnow._kvcache.arguments import integer

_MOST = 2**31 - 1  # tokens of a row


def h2o_positions(mass: Tensor, seq_lens: Tensor, *, heavy: int, recent: int) -> Tensor:
    """The ``heavy`` tokens that received most attention and the ``recent`` last ones.

    H2O (Zhang et al., 2023): ``mass`` is what :func:`attention_mass` gives, added up over the steps
    so far. Of equal ones the earliest token is kept, a NaN counts as 0.

    Args:
        mass: ``(B, Hkv, N)`` floating point.
        seq_lens: ``(B,)``, tokens of each row; positions behind them are not kept.
        heavy: tokens to keep by their mass.
        recent: last tokens, always kept.

    Returns:
        ``(B, Hkv, heavy + recent)`` int64 positions, ascending, padded with -1: what
        :meth:`PagedKVCache.compact_` takes. A row with fewer tokens keeps all of them.

    Raises:
        ValueError: on a wrong shape or dtype or a negative number.

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import h2o_positions
        >>> mass = torch.tensor([[[3.0, 0.1, 0.2, 2.0, 0.3, 0.4]]])
        >>> h2o_positions(mass, torch.tensor([6]), heavy=2, recent=1)
        tensor([[[0, 3, 5]]])
    """
    _check(mass, seq_lens)
    return _best(mass, seq_lens, _count("heavy", heavy), _count("recent", recent))


def snapkv_positions(
    mass: Tensor,
    seq_lens: Tensor,
    *,
    capacity: int,
    window: int,
    kernel_size: int = 5,
    pooling: Literal["avg", "max"] = "avg",
) -> Tensor:
    """The tokens that the last queries of a prompt attend to, in clusters, and those queries' own.

    SnapKV (Li et al., 2024): ``mass`` is that of the prompt's last ``window`` queries; the votes
    for the tokens before them are pooled, so that what surrounds an important token stays with it,
    and each key head keeps the best.

    Args:
        mass: ``(B, Hkv, N)`` floating point, ``attention_mass(query[:, :, -window:], ...)``.
        seq_lens: ``(B,)``, tokens of each row.
        capacity: tokens to keep in all, at least ``window``.
        window: last tokens, always kept.
        kernel_size: of the pooling, odd.
        pooling: ``"avg"`` or ``"max"``.

    Returns:
        ``(B, Hkv, capacity)`` int64 positions, ascending, padded with -1.

    Raises:
        ValueError: on a wrong shape, dtype or option.

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import snapkv_positions
        >>> mass = torch.tensor([[[0.0, 0.1, 0.9, 0.0, 0.0, 0.0, 0.5, 0.3, 0.2]]])
        >>> snapkv_positions(mass, torch.tensor([9]), capacity=5, window=2, kernel_size=3)
        tensor([[[1, 2, 3, 7, 8]]])
    """
    return _snap(mass, seq_lens, capacity, window, kernel_size, pooling)


def fastkv_positions(
    mass: Tensor,
    seq_lens: Tensor,
    *,
    capacity: int,
    window: int,
    kernel_size: int = 5,
    pooling: Literal["avg", "max"] = "avg",
) -> Tensor:
    """The tokens that go on to the layers behind this one: SnapKV's votes, summed over the heads.

    FastKV (Jo et al., 2025), token-selective propagation: from one layer on a prompt continues with
    these tokens' hidden states alone, so all heads share them.

    Args:
        mass, seq_lens, capacity, window, kernel_size, pooling: as in :func:`snapkv_positions`.

    Returns:
        ``(B, capacity)`` int64 positions, ascending, padded with -1.

    Raises:
        ValueError: on a wrong shape, dtype or option.

    Example:
        >>> import torch
        >>> from torch_winnow.kvcache import fastkv_positions
        >>> mass = torch.tensor([[[0.9, 0.0, 0.0, 0.1], [0.0, 0.0, 0.5, 0.5]]])
        >>> fastkv_positions(mass, torch.tensor([4]), capacity=2, window=1, kernel_size=1)
        tensor([[0, 3]])
    """
    _check(mass, seq_lens)
    total = mass.nan_to_num(nan=0.0).sum(1, keepdim=True)
    return _snap(total, seq_lens, capacity, window, kernel_size, pooling)[:, 0]


def _snap(
    mass: Tensor, seq_lens: Tensor, capacity: int, window: int, kernel_size: int, pooling: str
) -> Tensor:
    _check(mass, seq_lens)
    window, kernel_size = _count("window", window), integer("kernel_size", kernel_size)
    if integer("capacity", capacity) < window:
        raise ValueError(f"capacity: expected at least window = {window}, got {capacity}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: expected an odd number of at least 1, got {kernel_size}")
    if pooling not in ("avg", "max"):
        raise ValueError(f"pooling: expected 'avg' or 'max', got {pooling!r}")
    position = torch.arange(mass.shape[2], device=mass.device)
    voted = position < (seq_lens.to(mass.device) - window)[:, None, None]
    votes = torch.where(voted, mass.nan_to_num(nan=0.0), 0.0)
    if votes.numel() > 0:
        pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
        votes = pool(votes, kernel_size, stride=1, padding=kernel_size // 2)
    return _best(votes, seq_lens, capacity - window, window)


def _count(argument: str, value: int) -> int:
    if integer(argument, value) < 0:
        raise ValueError(f"{argument}: expected at least 0, got {value}")
    return value


def _check(mass: Tensor, seq_lens: Tensor) -> None:
    if not isinstance(mass, Tensor) or mass.dim() != 3 or not mass.is_floating_point():
        got = f"{tuple(mass.shape)} of {mass.dtype}" if isinstance(mass, Tensor) else repr(mass)
        raise ValueError(f"mass: expected (B, Hkv, N) of a floating dtype, got {got}")
    if not isinstance(seq_lens, Tensor) or seq_lens.shape != mass.shape[:1]:
        got = str(tuple(seq_lens.shape)) if isinstance(seq_lens, Tensor) else repr(seq_lens)
        raise ValueError(f"seq_lens: expected (B,) with B={len(mass)} as in mass, got {got}")
    if seq_lens.is_floating_point() or seq_lens.is_complex() or seq_lens.dtype == torch.bool:
        raise ValueError(f"seq_lens: expected integers, got {seq_lens.dtype}")


def _best(votes: Tensor, seq_lens: Tensor, best: int, recent: int) -> Tensor:
    """Ascending positions of the ``best`` votes and of the ``recent`` last ones; -1 for none."""
    if best + recent > _MOST:
        raise ValueError(
            f"capacity, heavy, recent: expected at most {_MOST} positions, got {best + recent}"
        )
    positions = votes.shape[2]
    index = torch.arange(positions, device=votes.device)
    lengths = seq_lens.to(votes.device)[:, None, None].clamp(max=positions)
    most = torch.finfo(votes.dtype).max
    rank = votes.nan_to_num(nan=0.0).clamp(-most, most)
    rank = torch.where(index >= lengths - recent, torch.inf, rank)
    rank = torch.where(index >= lengths, -torch.inf, rank)
    # Stable, so that of equal votes the earliest position wins.
    order = rank.sort(dim=2, descending=True, stable=True).indices[:, :, : best + recent]
    order = torch.where(order < lengths, order, positions).sort(2).values
    kept = order.masked_fill(order == positions, -1)
    return F.pad(kept, (0, best + recent - kept.shape[2]), value=-1)

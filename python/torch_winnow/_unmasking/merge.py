"""Statistics of a whole vocabulary from those of its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._unmasking.logit_stats import LogitStats, as_stats, empty_statistics

_merge_logit_stats = torch.ops.winnow.merge_logit_stats


def merge_logit_stats(parts: Sequence[LogitStats]) -> LogitStats:
    """What :func:`logit_stats` of the whole vocabulary returns, from its parts.

    Bit for bit the same, wherever the vocabulary is cut: what a process sends of its part are sums
    over blocks of 1024 tokens on a grid that starts at token 0, and the logits of a block that it
    shares with its neighbours, at most 1023 at each end (multiples of 1024 share none). A token is
    drawn from the whole distribution, with the seed of the parts; it is the one that the whole row
    would have drawn.

    With a process group, gather the parts of all ranks (``torch.distributed.all_gather`` of
    ``stats.parts[0].blocks``, or ``all_gather_object`` of ``stats``) and merge them on each: every
    rank gets the same.

    Args:
        parts: :class:`LogitStats` from calls with ``vocab_start``, in any order, with the same rows
            and options. Together they must cover a run of ids without gap or overlap.

    Returns:
        :class:`LogitStats`, which can be merged with its neighbours again.

    Raises:
        ValueError: for parts that do not adjoin or do not belong together.

    Example:
        >>> import torch
        >>> from torch_winnow.unmasking import logit_stats, merge_logit_stats
        >>> logits = torch.tensor([[0.0, 3.0, 1.0, 4.0]])
        >>> low = logit_stats(logits[:, :3], vocab_start=0)
        >>> high = logit_stats(logits[:, 3:], vocab_start=3)
        >>> whole = merge_logit_stats([low, high])
        >>> whole.argmax, bool(whole.entropy == logit_stats(logits).entropy)
        (tensor([3]), True)
    """
    if isinstance(parts, LogitStats) or not isinstance(parts, Sequence):
        raise ValueError(f"parts: expected a sequence of LogitStats, got {type(parts).__name__}")
    for part in parts:
        if not isinstance(part, LogitStats) or not part.parts:
            raise ValueError(
                "parts: expected LogitStats from logit_stats(..., vocab_start=...), got "
                f"{part if not isinstance(part, LogitStats) else 'one without vocab_start'!r}"
            )
    pieces = sorted(
        (piece for part in parts for piece in part.parts or ()),
        key=lambda piece: (piece.start, piece.stop),
    )
    if not pieces:
        raise ValueError("parts: expected at least one, got none")
    first = pieces[0]
    for before, piece in zip(pieces, pieces[1:], strict=False):
        if before.stop != piece.start:
            raise ValueError(
                "parts: expected adjoining parts of the vocabulary, got one that ends at "
                f"{before.stop} before one that starts at {piece.start}"
            )
        for name in ("temperature", "raw", "has_target", "has_previous"):
            if getattr(piece, name) != getattr(first, name):
                raise ValueError(
                    f"parts: expected the same {name} in all of them, got {getattr(first, name)} "
                    f"and {getattr(piece, name)}"
                )
        if (piece.seed is None) != (first.seed is None):
            raise ValueError("parts: expected the same seed in all of them, got some without one")
        if _differ(piece.seed, first.seed):
            raise ValueError(
                f"parts: expected the same seed in all of them, got {first.seed} and {piece.seed}"
            )
    merged = _merge_logit_stats(
        [piece.blocks for piece in pieces],
        [piece.start for piece in pieces],
        [piece.stop - piece.start for piece in pieces],
        first.temperature,
        first.seed,
        first.raw,
        first.has_target,
        first.has_previous,
    )
    return as_stats(merged, first.has_target, first.has_previous)._replace(parts=tuple(pieces))


def _differ(seed: Tensor | None, other: Tensor | None) -> bool:
    """Whether two seeds are known to differ: one on a GPU is not waited for."""
    if seed is other or seed is None or other is None or torch.compiler.is_compiling():
        return False
    return seed.is_cpu and other.is_cpu and int(seed) != int(other)


@register_fake("merge_logit_stats")
def _(
    parts: list[Tensor],
    starts: list[int],
    counts: list[int],
    temperature: float,
    seed: Tensor | None,
    raw: bool,
    has_target: bool,
    has_previous: bool,
    row_keys: Tensor | None = None,
) -> tuple[Tensor, ...]:
    for part in parts:
        check_same_device(parts=parts[0], part=part)
    check_same_device(parts=parts[0], seed=seed)
    return empty_statistics(parts[0], tuple(parts[0].shape[:-1]), has_target, has_previous)

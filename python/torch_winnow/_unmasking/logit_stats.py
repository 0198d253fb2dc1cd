"""Statistics of logits for decoding: one read, no copy in higher precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torch_winnow import _library  # noqa: F401  (registers the operators)
from torch_winnow._fake import check_same_device, register_fake
from torch_winnow._slow_path import warn_slow
from torch_winnow._unmasking.arguments import integer

_logit_stats = torch.ops.winnow.logit_stats

# As in csrc/unmasking/logit_part.h.
BLOCK, _HEADER = 1024, 4
_WORTH_A_WORD = 1 << 22  # logits; a copy of fewer is nothing to warn of


class VocabularyPart(NamedTuple):
    """What :func:`merge_logit_stats` needs of one part of a vocabulary.

    ``blocks`` is all that has to travel between processes that agree on the rest.

    Attributes:
        start, stop: the token ids of the part.
        blocks: ``(..., words)``, a few bytes per 1024 tokens (all logits for float64 ones).
        temperature, raw, seed: of the draws and statistics, the same in all parts.
        has_target, has_previous: whether there were ``target_ids`` and ``previous_logits``.
    """

    start: int
    stop: int
    blocks: Tensor
    temperature: float
    raw: bool
    seed: Tensor | None
    has_target: bool
    has_previous: bool


class LogitStats(NamedTuple):
    """What :func:`logit_stats` returns, one entry per row of logits.

    Statistics are float32 (float64 for float64 logits), ids are int64, entropies and logarithms are
    in nats. A skipped row holds zeros and token -1; a row with a NaN, or without any finite logit,
    holds NaN and token -1.

    Attributes:
        token: the token drawn, or the argmax where nothing is drawn.
        log_prob: log-probability of ``token``.
        argmax: the most probable token; the lowest id among equals.
        max_prob: its probability.
        margin: by how much that exceeds the second largest probability.
        entropy: of the distribution.
        logsumexp: of the logits that the distribution comes from.
        target_log_prob: log-probability of ``target_ids``, or None without them.
        kl: divergence from ``previous_logits``, or None without them.
        parts: with ``vocab_start``, what :func:`merge_logit_stats` merges; else None.
    """

    token: Tensor
    log_prob: Tensor
    argmax: Tensor
    max_prob: Tensor
    margin: Tensor
    entropy: Tensor
    logsumexp: Tensor
    target_log_prob: Tensor | None
    kl: Tensor | None
    parts: tuple[VocabularyPart, ...] | None = None


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {value!r}")


def _warn_of_a_copy(logits: Tensor) -> None:
    """The kernels read evenly spaced rows in place and copy others (``as_rows``, tensors.h)."""
    if logits.numel() < _WORTH_A_WORD:
        return
    copied, expected = logits.stride(-1) != 1, None
    for size, stride in reversed(list(zip(logits.shape, logits.stride(), strict=True))[:-1]):
        if size > 1:
            copied |= expected not in (None, stride)
            expected = size * stride
    if copied:
        warn_slow(
            "logits copied",
            f"logits: {logits.numel() * logits.element_size() >> 20} MB of shape "
            f"{tuple(logits.shape)} with strides {logits.stride()} are copied first, because their "
            "rows are not evenly spaced. Slice before the projection that makes them, pass "
            "shift=True instead of logits[:, :-1], or leave rows out with mask",
            stacklevel=5,
        )


def seed_tensor(seed: int | Tensor | None, generator: torch.Generator | None) -> Tensor | None:
    """The key of the draws as a 0-dim int64 tensor, or None where nothing is drawn."""
    if seed is not None and generator is not None:
        raise ValueError("seed: expected either seed or generator, got both")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: expected a torch.Generator, got {generator!r}")
    if generator is not None:
        return torch.randint(
            -(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator, device=generator.device
        )
    if seed is None or isinstance(seed, Tensor):
        return seed
    return torch.tensor(integer("seed", seed), dtype=torch.int64)


def id_tensor(ids: Tensor | Sequence[int] | None, like: Tensor) -> Tensor | None:
    if isinstance(ids, Tensor) and (ids.dtype != torch.int64 or ids.dim() != 1):
        raise ValueError(f"suppress_ids: expected (n,) int64, got {tuple(ids.shape)} {ids.dtype}")
    if ids is None or isinstance(ids, Tensor):
        return ids
    try:
        values = [integer("suppress_ids", i) for i in ids]
    except (TypeError, ValueError):
        raise ValueError(f"suppress_ids: expected integer token ids, got {ids!r}") from None
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def is_raw(statistics: str) -> bool:
    if statistics not in ("processed", "raw"):
        raise ValueError(f"statistics: expected 'processed' or 'raw', got {statistics!r}")
    return statistics == "raw"


def logit_stats(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    suppress_ids: Tensor | Sequence[int] | None = None,
    target_ids: Tensor | None = None,
    previous_logits: Tensor | None = None,
    unconditional_logits: Tensor | None = None,
    cfg_scale: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    statistics: str = "processed",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    vocab_start: int | None = None,
    shift: bool = False,
) -> LogitStats:
    """Token, confidence, entropy and more of each row of logits, from one read of them.

    All of them describe one distribution: the softmax of the logits after guidance
    (``unconditional + (cfg_scale + 1) * (logits - unconditional)``, Ho and Salimans 2022; equal
    logits stay as they are, infinite ones included), suppression, division by the temperature,
    top-k, top-p and min-p. Computed in float32 without a float32 copy of the logits; bitwise the
    same on every instruction set and for any number of threads.

    A draw is exact in the tail: 64-bit uniforms choose a block of the vocabulary by its mass and a
    token in it. (With 24-bit Gumbel noise a token 17 nats below the top comes at 0.44 of its rate:
    Zheng et al., arXiv 2409.02908.) It depends on the seed, the row's index over the leading
    dimensions, and the row. Not differentiable: what comes out never requires a gradient.

    Where processes hold parts of the vocabulary, ``vocab_start`` makes each part's statistics ones
    that :func:`merge_logit_stats` can merge.

    Args:
        logits: ``(..., V)`` float32, bfloat16, float16 or float64; strided rows are fine.
        mask: ``(...)`` bool. Rows where it is false are never read: they hold zeros and token -1.
        temperature: a number >= 0. 0 takes the argmax, with the statistics of temperature 1.
        suppress_ids: token ids that get no probability.
        target_ids: ``(...)`` int64, tokens whose log-probability is wanted.
        previous_logits: like ``logits``, those of the step before, for ``kl``: KL(current ||
            previous) with the same ids suppressed and the same temperature; +inf where the previous
            has no mass. Guidance and truncation are not applied to them.
        unconditional_logits: like ``logits``, for classifier-free guidance.
        cfg_scale: its strength; 0 leaves ``logits`` as they are.
        top_k: keeps so many of the largest logits; ties are kept from the lowest id on.
        top_p: then keeps the smallest set of them whose mass is at least ``top_p`` of theirs.
        min_p: then keeps the tokens at least ``min_p`` times as probable as the most probable one,
            in [0, 1] (Nguyen et al., arXiv 2407.01082): logits of at least the largest plus
            ``temperature * log(min_p)``, which is rounded to the statistics' precision.
        statistics: ``"raw"`` measures at temperature 1 before truncation, and still draws from
            the processed distribution. (LLaDA ranks positions by raw ones, Dream by processed.)
        seed: key of the draws, an int or a 0-dim int64 tensor; without it and ``generator`` the
            token is the argmax.
        generator: to take such a seed from; ``torch.compile`` cannot trace one, pass a seed there.
        vocab_start: says that the logits are those of the tokens from this id on. Statistics are
            then those of the part by itself; ``token``, ``argmax``, ``suppress_ids`` and
            ``target_ids`` are ids of the whole vocabulary, and those outside of the part are
            ignored (``target_log_prob`` is -inf). Not with ``top_k``, ``top_p`` or ``min_p``:
            what they keep of a part depends on the other parts.
        shift: for models whose logits at a position predict the next one, as Dream's do: what is
            returned for position i of ``(..., L)`` is that of the logits at i - 1, and at 0 for the
            first, without a copy of them. ``mask``, ``target_ids`` and the draws are those of i.

    Returns:
        :class:`LogitStats`, each ``(...)``. A row whose largest logit is +inf has that token,
        ``logsumexp`` +inf, and otherwise NaN.

    Raises:
        ValueError: for a wrong shape, dtype or option, or an id outside ``[0, V)``.

    Example:
        >>> import torch
        >>> from torch_winnow.unmasking import logit_stats
        >>> stats = logit_stats(torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 2.0]]))
        >>> stats.token, stats.entropy
        (tensor([1, 0]), tensor([0.5243, 1.0986]))
    """
    check_tensor("logits", logits)
    if vocab_start is not None and not torch.compiler.is_compiling():
        vocab_start = integer("vocab_start", vocab_start)
        if vocab_start > 2**63 - 1 - logits.shape[-1]:
            raise ValueError(
                f"vocab_start: expected ids below 2^63, got {vocab_start} and {logits.shape[-1]} "
                "logits from there on"
            )
    if mask is not None:
        check_tensor("mask", mask)
    operands = logit_operands(
        logits,
        temperature=temperature,
        suppress_ids=suppress_ids,
        target_ids=target_ids,
        previous_logits=previous_logits,
        unconditional_logits=unconditional_logits,
        cfg_scale=cfg_scale,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        statistics=statistics,
        seed=seed,
        generator=generator,
    )
    *statistic, blocks = _logit_stats(logits.detach(), mask, *operands, vocab_start, shift)
    has_target, has_previous = target_ids is not None, previous_logits is not None
    stats = as_stats(statistic, has_target, has_previous)
    if vocab_start is None:
        return stats
    part = VocabularyPart(
        vocab_start,
        vocab_start + logits.shape[-1],
        blocks,
        temperature,
        is_raw(statistics),
        operands.seed,
        has_target,
        has_previous,
    )
    return stats._replace(parts=(part,))


class LogitOperands(NamedTuple):
    """Options of :func:`logit_stats` as the operators take them, in their order."""

    temperature: float
    suppress_ids: Tensor | None
    target_ids: Tensor | None
    previous_logits: Tensor | None
    unconditional_logits: Tensor | None
    cfg_scale: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: Tensor | None
    raw: bool


def logit_operands(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    suppress_ids: Tensor | Sequence[int] | None = None,
    target_ids: Tensor | None = None,
    previous_logits: Tensor | None = None,
    unconditional_logits: Tensor | None = None,
    cfg_scale: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    statistics: str = "processed",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LogitOperands:
    check_tensor("logits", logits)
    for name, value in (
        ("target_ids", target_ids),
        ("previous_logits", previous_logits),
        ("unconditional_logits", unconditional_logits),
    ):
        if value is not None:
            check_tensor(name, value)
    if not torch.compiler.is_compiling() and not logits.is_contiguous():
        _warn_of_a_copy(logits)
    if unconditional_logits is None and cfg_scale != 0.0:
        raise ValueError(
            f"cfg_scale: expected 0 without unconditional_logits to guide with, got {cfg_scale}"
        )
    if unconditional_logits is not None and unconditional_logits.shape != logits.shape:
        raise ValueError(
            f"unconditional_logits: expected {tuple(logits.shape)} as in logits, got "
            f"{tuple(unconditional_logits.shape)}"
        )
    guided = cfg_scale != 0.0 and unconditional_logits is not None
    return LogitOperands(
        temperature,
        id_tensor(suppress_ids, logits),
        target_ids,
        None if previous_logits is None else previous_logits.detach(),
        unconditional_logits.detach() if guided and unconditional_logits is not None else None,
        cfg_scale,
        None if top_k is None else integer("top_k", top_k),
        top_p,
        min_p,
        seed_tensor(seed, generator),
        is_raw(statistics),
    )


def as_stats(statistic: Sequence[Tensor], has_target: bool, has_previous: bool) -> LogitStats:
    """What the operators return, None for what was not asked for."""
    token, log_prob, argmax, max_prob, margin, entropy, logsumexp, target, kl = statistic
    return LogitStats(
        token,
        log_prob,
        argmax,
        max_prob,
        margin,
        entropy,
        logsumexp,
        target if has_target else None,
        kl if has_previous else None,
    )


@register_fake("logit_stats")
def _(
    logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    suppress_ids: Tensor | None,
    target_ids: Tensor | None,
    previous_logits: Tensor | None,
    unconditional_logits: Tensor | None,
    cfg_scale: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: Tensor | None,
    raw: bool,
    vocab_start: int | None = None,
    shift: bool = False,
    row_keys: Tensor | None = None,
) -> tuple[Tensor, ...]:
    check_same_device(logits=logits, mask=mask, suppress_ids=suppress_ids, target_ids=target_ids)
    check_same_device(logits=logits, previous_logits=previous_logits, seed=seed)
    check_same_device(logits=logits, unconditional_logits=unconditional_logits)
    statistics = empty_statistics(
        logits, logits.shape[:-1], target_ids is not None, previous_logits is not None
    )
    shape: tuple[int, ...] = (0,)
    if vocab_start is not None:
        words = part_words(
            vocab_start,
            logits.shape[-1],
            previous_logits is not None,
            logits.dtype == torch.float64,
        )
        shape = (*logits.shape[:-1], words)
    return *statistics, statistics[1].new_empty(shape)


def empty_statistics(
    like: Tensor, rows: tuple[int, ...], has_target: bool, has_previous: bool
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32

    def statistic(present: bool = True) -> Tensor:
        return like.new_empty(rows if present else (0,), dtype=dtype)

    def ids() -> Tensor:
        return like.new_empty(rows, dtype=torch.int64)

    return (
        ids(),
        statistic(),
        ids(),
        statistic(),
        statistic(),
        statistic(),
        statistic(),
        statistic(has_target),
        statistic(has_previous),
    )


def part_words(start: int, vocab: int, previous: bool, double: bool) -> int:
    """The length of a row of ``VocabularyPart.blocks``, as in csrc/unmasking/logit_part.h."""
    head = vocab if double else min(-start % BLOCK, vocab)
    whole = (vocab - head) // BLOCK
    edges = vocab - whole * BLOCK
    return _HEADER + edges + whole * 6 + (edges + whole * 3 if previous else 0)

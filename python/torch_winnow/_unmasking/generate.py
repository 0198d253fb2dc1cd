"""The loop around a model; public in :mod:`torch_winnow.unmasking`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_winnow._unmasking.arguments import count_or_none, integer
from torch_winnow._unmasking.logit_stats import logit_stats, seed_tensor
from torch_winnow._unmasking.results import AnswerEntropy, GenerateResult
from torch_winnow._unmasking.rules import Rule, TopK, check_rule, select
from torch_winnow._unmasking.step import (
    check_logits,
    check_tokens,
    in_window,
    order_seed,
    score_of,
    with_mask_id,
    write_tokens,
)

# Odd, so that the steps of one seed never share a key (the golden ratio, as in splitmix64).
_STEP_KEY = 0x9E3779B97F4A7C15 - 2**64


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Any],
    tokens: Tensor,
    *,
    mask_id: int,
    rule: Rule,
    block_length: int | None = None,
    steps: int | None = None,
    stop: AnswerEntropy | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    **logit_stats_options: Any,
) -> GenerateResult:
    """Fills the masks of ``tokens`` by calling a masked diffusion model until none is left.

    Each row is decoded in blocks of ``block_length`` positions from its first mask on; it moves to
    its next block when the current one is complete, whatever the other rows do. Every step writes
    at least one token in every unfinished row. No gradients are recorded.

    Args:
        model: maps tokens ``(B, L)`` to logits ``(B, L, V)``, or to an object whose ``logits`` they
            are.
        tokens: ``(B, L)`` int64 or int32 with ``mask_id`` where a token is wanted; left unchanged.
        mask_id: the mask's token id; never written.
        rule: one of the rule classes of this module.
        block_length: positions per block; None for one block.
        steps: at most this many calls per block: a step writes at least ceil(masks left in the
            block / steps left) tokens of a row, best first. With ``TopK(1)`` this is LLaDA's
            schedule.
        stop: ends rows early, see :class:`AnswerEntropy`.
        seed, generator: key of the draws, as in :func:`logit_stats`; noise is fresh at every step.
        logit_stats_options: further options of :func:`logit_stats`.

    Returns:
        :class:`GenerateResult`.

    Raises:
        ValueError: for a wrong shape, dtype or option.
        RuntimeError: where all logits of a row's masked positions are NaN.

    Example:
        >>> import torch
        >>> from torch_winnow.unmasking import EntropyThreshold, generate
        >>> table = 20.0 * torch.eye(5)[:4]
        >>> def model(tokens):  # the token at position i is i
        ...     return table.expand(tokens.shape[0], 4, 5)
        >>> result = generate(
        ...     model, torch.full((1, 4), 4), mask_id=4, rule=EntropyThreshold(0.2), block_length=2
        ... )
        >>> result.tokens, result.calls
        (tensor([[0, 1, 2, 3]]), 2)
    """
    check_tokens(tokens)
    check_rule(rule)
    mask_id = integer("mask_id", mask_id)
    block_length = count_or_none("block_length", block_length)
    steps = count_or_none("steps", steps)
    for name in ("mask", "target_ids", "previous_logits", "unconditional_logits"):
        if name in logit_stats_options:
            raise ValueError(f"{name}: belongs to one step, so generate does not take it")
    if logit_stats_options.get("cfg_scale"):
        raise ValueError(
            "cfg_scale: generate has no unconditional logits to guide with; return guided logits "
            "from the model"
        )
    tokens = tokens.clone()
    batch, length = tokens.shape
    device = tokens.device
    step_seed = seed_tensor(seed, generator)
    suppress_ids = logit_stats_options.pop("suppress_ids", None)
    schedule = _schedule(rule, device)
    answer = _answer_positions(stop, tokens)
    step_map = torch.full((batch, length), -1, dtype=torch.int64, device=device)
    entropies = torch.zeros(batch, length, device=device)
    block = block_length or max(length, 1)
    masked = tokens == mask_id
    first = _first(masked)
    stopped = torch.zeros(batch, dtype=torch.bool, device=device)
    block_index = torch.full_like(first, -1)
    block_step = torch.zeros_like(first)
    calls = 0
    while bool(masked.any()):
        logits = model(tokens.clone())  # a copy: what the model does to its input stays there
        logits = getattr(logits, "logits", logits)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"model: expected logits (B, L, V) or an object with them, got {logits!r}"
            )
        check_logits(logits, tokens)
        current = (_first(masked) - first) // block
        block_step = torch.where(current == block_index, block_step + 1, 0)
        block_index = current
        start = first + current * block
        in_block = masked & in_window(torch.stack([start, start + block], 1), length)
        stats = logit_stats(
            logits,
            mask=in_block if answer is None else in_block | (masked & answer),
            suppress_ids=with_mask_id(mask_id, suppress_ids, logits),
            seed=step_seed,
            **logit_stats_options,
        )
        least = schedule[block_step.clamp(max=len(schedule) - 1)]
        if steps is not None:
            left = (steps - block_step).clamp(min=1)
            least = torch.maximum(least, (in_block.sum(1) + left - 1) // left)
        transfer, _ = select(
            score_of(stats, rule),
            in_block,
            rule,
            at_least=least,
            seed=order_seed(rule, step_seed, tokens),
        )
        if stop is not None and answer is not None:
            pending = masked & answer
            total = torch.where(pending, stats.entropy, 0.0).sum(1)
            ends = answer.any(1) & ~stopped & (total < stop.gamma)
            transfer = torch.where(ends[:, None], pending, transfer)
            stopped = stopped | ends
        written = write_tokens(tokens, transfer, stats)
        step_map.masked_fill_(written.transfer, calls)
        entropies = torch.where(written.transfer, stats.entropy.float(), entropies)
        stuck = in_block.any(1) & ~stopped & (written.count == 0)
        if bool(stuck.any()):
            raise RuntimeError(
                f"model: at step {calls} every masked position of row {int(_first(stuck[None]))} "
                "has NaN logits or none that is finite"
            )
        masked = (tokens == mask_id) & ~stopped[:, None]
        step_seed = None if step_seed is None else step_seed + _STEP_KEY  # wraps around
        calls += 1
    return GenerateResult(tokens, step_map, calls, entropies)


def _first(flags: Tensor) -> Tensor:
    """Index of the first true flag of each row, 0 without one."""
    if flags.shape[1] == 0:
        return torch.zeros(flags.shape[0], dtype=torch.int64, device=flags.device)
    return flags.to(torch.uint8).argmax(1)


def _schedule(rule: Rule, device: torch.device) -> Tensor:
    """The fewest tokens of each step of a block."""
    steps = rule.schedule() if isinstance(rule, TopK) else (1,)
    return torch.tensor(steps, dtype=torch.int64, device=device)


def _answer_positions(stop: AnswerEntropy | None, tokens: Tensor) -> Tensor | None:
    if stop is None:
        return None
    if not isinstance(stop, AnswerEntropy):
        raise ValueError(f"stop: expected None or AnswerEntropy, got {stop!r}")
    positions = stop.positions
    if positions.dtype != torch.bool or tuple(positions.shape) not in (
        tuple(tokens.shape),
        tuple(tokens.shape[1:]),
    ):
        raise ValueError(
            f"stop.positions: expected {tuple(tokens.shape)} or {tuple(tokens.shape[1:])} bool, "
            f"got {tuple(positions.shape)} {positions.dtype}"
        )
    return positions.expand(tokens.shape)

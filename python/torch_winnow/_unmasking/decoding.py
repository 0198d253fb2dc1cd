"""The state of a batch that is being decoded; public in :mod:`torch_winnow.unmasking`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_winnow._unmasking.arguments import count_or_none, integer
from torch_winnow._unmasking.choosers import View, chooser_of
from torch_winnow._unmasking.history_rules import (
    DecodingRule,
    DraftVerify,
    FirstHitting,
    KLStability,
    Remasking,
    check_decoding_rule,
)
from torch_winnow._unmasking.logit_stats import LogitStats, logit_stats, seed_tensor
from torch_winnow._unmasking.results import AnswerEntropy, GenerateResult, StepContext
from torch_winnow._unmasking.rules import TopK
from torch_winnow._unmasking.step import check_logits, check_tokens, in_window, with_mask_id

# Odd, so that the steps of one seed never share a key (the golden ratio, as in splitmix64).
STEP_KEY = 0x9E3779B97F4A7C15 - 2**64


class DecodingStatus(NamedTuple):
    """Where a decode stands: the one thing that is read from the device in each step.

    Attributes:
        unfinished: whether any row is still being decoded.
        needs_logits: whether the coming step reads logits that differ from the last ones.
        masks: how many masks are left in the rows that are being decoded.
    """

    unfinished: bool
    needs_logits: bool
    masks: int


class Decoding:
    """A batch that is being decoded, for loops of one's own; :func:`generate` is the usual one.

    Call the model on :attr:`tokens`, hand its logits to :meth:`advance`, until :meth:`status` says
    that nothing is left. All that a rule remembers from step to step is kept here, on the device;
    only :meth:`status` waits for it.

    Args:
        tokens, mask_id, rule, block_length, sliding, steps, stop, seed: as in :func:`generate`.
        generator, logit_stats_options: as in :func:`generate`.

    Attributes:
        tokens: ``(B, L)``, as decoded so far.
        step_map, entropies: as in :class:`GenerateResult`.
        step: how many steps were made.

    Example:
        >>> import torch
        >>> from torch_winnow.unmasking import Decoding, EntropyThreshold
        >>> logits = 20.0 * torch.eye(4, 5)[None]  # the token at position i is i
        >>> decoding = Decoding(torch.full((1, 4), 4), mask_id=4, rule=EntropyThreshold(0.2))
        >>> while decoding.status().unfinished:
        ...     decoding.advance(logits)
        >>> decoding.tokens
        tensor([[0, 1, 2, 3]])
    """

    @torch.no_grad()
    def __init__(
        self,
        tokens: Tensor,
        *,
        mask_id: int,
        rule: DecodingRule,
        block_length: int | None = None,
        sliding: bool = False,
        steps: int | None = None,
        stop: AnswerEntropy | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        **logit_stats_options: Any,
    ) -> None:
        check_tokens(tokens)
        check_decoding_rule(rule)
        for name in ("mask", "target_ids", "previous_logits", "unconditional_logits"):
            if name in logit_stats_options:
                raise ValueError(f"{name}: belongs to one step, so generate does not take it")
        if logit_stats_options.get("vocab_start") is not None:
            raise ValueError(
                "vocab_start: expected None, as a decode needs the whole vocabulary, got "
                f"{logit_stats_options['vocab_start']}; merge parts of it in the model"
            )
        self.mask_id = integer("mask_id", mask_id)
        batch, length = tokens.shape
        longest = max(length, 1)  # what is more would overflow and changes nothing
        self._steps = count_or_none("steps", steps)
        if self._steps is not None and isinstance(rule, DraftVerify | Remasking | FirstHitting):
            raise ValueError(f"steps: expected None with {rule}, which ends by itself, got {steps}")
        if isinstance(rule, KLStability) and logit_stats_options.get("cfg_scale"):
            raise ValueError(
                "cfg_scale: expected 0 with KLStability, which compares unguided logits, got "
                f"{logit_stats_options['cfg_scale']}"
            )
        if self._steps is not None:
            self._steps = min(self._steps, longest)
        device = tokens.device
        self._block = min(count_or_none("block_length", block_length) or longest, longest)
        self._sliding = sliding
        if sliding and isinstance(rule, DraftVerify | Remasking | FirstHitting):
            raise ValueError(
                f"sliding: expected False with {rule}, which needs blocks that stay, got {sliding}"
            )
        if sliding and self._steps is not None:
            raise ValueError(f"steps: expected None with a sliding window, got {steps}")
        self._stop = stop
        self._answer = _answer_positions(stop, tokens)
        self._suppress_ids = logit_stats_options.pop("suppress_ids", None)
        self._options = logit_stats_options
        seed_of_all = seed_tensor(seed, generator)
        self._seed = None if seed_of_all is None else seed_of_all.to(device)
        counts = rule.schedule() if isinstance(rule, TopK) else (1,)
        self._schedule = torch.tensor(counts, dtype=torch.int64, device=device)

        self.tokens = tokens.clone()
        self.step = 0
        self.step_map = torch.full((batch, length), -1, dtype=torch.int64, device=device)
        self.entropies = torch.zeros(batch, length, device=device)
        self._masked = tokens == self.mask_id
        self._given = ~self._masked
        self._changed = torch.ones_like(self._masked)
        self._first = _first(self._masked)
        self._start = self._first
        self._block_step = torch.zeros_like(self._first)
        self._active = self._masked.any(1)
        self._stuck = torch.zeros_like(self._active)
        self._chooser = chooser_of(rule, tokens)
        self._begin()

    @property
    def context(self) -> StepContext:
        """What a model may want to know before the coming step."""
        window = torch.stack([self._start, self._start + self._block], 1)
        window = window.clamp(max=self.tokens.shape[1])
        return StepContext(
            window, self._changed, self._active, self._chooser.time, self.mask_id, self._block
        )

    def status(self) -> DecodingStatus:
        """Where the decode stands; waits for the device.

        Raises:
            RuntimeError: where all logits of a row's masked positions were NaN.
        """
        masks = (self._masked & self._active[:, None]).sum()
        changed = (self._changed & self._active[:, None]).any() & self._view.masked.any()
        flags = [self._active.any(), changed, self._stuck.any(), masks]
        unfinished, needs_logits, stuck, left = torch.stack([f.long() for f in flags]).tolist()
        if stuck:
            raise RuntimeError(
                f"model: at step {self.step - 1} every masked position of row "
                f"{int(_first(self._stuck[None]))} has NaN logits or none that is finite"
            )
        return DecodingStatus(bool(unfinished), bool(needs_logits), left)

    @torch.no_grad()
    def advance(
        self, logits: Tensor, unconditional_logits: Tensor | None = None, *, fresh: bool = True
    ) -> None:
        """One step: statistics, choice, write.

        Args:
            logits: ``(B, L, V)``, the model's of :attr:`tokens`.
            unconditional_logits: likewise, to guide with where ``cfg_scale`` was given.
            fresh: False where these are the logits of the step before, nothing having changed.
        """
        check_logits(logits, self.tokens)
        view = self._view
        measured = self._chooser.measured(view)
        pending = None
        if self._answer is not None:
            pending = self._masked & self._answer & self._active[:, None]
        stats = logit_stats(
            logits,
            mask=measured if pending is None else measured | pending,
            suppress_ids=with_mask_id(self.mask_id, self._suppress_ids, logits),
            seed=self._seed,
            unconditional_logits=unconditional_logits,
            **self._chooser.options(self.tokens, view, logits),
            **self._options,
        )
        transfer, remask = self._chooser.choose(view, stats)
        stopped = torch.zeros_like(self._active)
        if self._stop is not None and pending is not None and self._answer is not None:
            total = torch.where(pending, stats.entropy, 0.0).sum(1)
            stopped = self._answer.any(1) & self._active & (total < self._stop.gamma)
            transfer = torch.where(stopped[:, None], pending, transfer)
            remask = None if remask is None else remask & ~stopped[:, None]
        written = transfer & (stats.token >= 0)
        self._write(written, remask, stats)
        self._chooser.end(written, stats)
        changed = written if remask is None else written | remask
        self._changed = changed if fresh else self._changed | changed
        self._next_block(written, stopped)
        self.step += 1
        if self._seed is not None:
            self._seed = self._seed + STEP_KEY  # wraps around
        self._begin()

    def result(self, calls: int) -> GenerateResult:
        """What :func:`generate` returns, after ``calls`` calls of the model."""
        return GenerateResult(self.tokens, self.step_map, calls, self.entropies)

    def _begin(self) -> None:
        window = torch.stack([self._start, self._start + self._block], 1)
        self._inside = in_window(window, self.tokens.shape[1]) & self._active[:, None]
        masked = self._masked & self._inside
        least = self._schedule[self._block_step.clamp(max=len(self._schedule) - 1)]
        if self._steps is not None:
            left = (self._steps - self._block_step).clamp(min=1)
            least = torch.maximum(least, (masked.sum(1) + left - 1) // left)
        written = self._inside & ~self._masked & ~self._given
        self._view = View(masked, written, self._block_step, least, self._seed)
        self._chooser.begin(self._view)

    def _write(self, written: Tensor, remask: Tensor | None, stats: LogitStats) -> None:
        self.tokens = torch.where(written, stats.token, self.tokens).to(self.tokens.dtype)
        self.step_map = torch.where(written, self.step, self.step_map)
        self.entropies = torch.where(written, stats.entropy.float(), self.entropies)
        self._masked = self._masked & ~written
        if remask is not None:
            self.tokens = torch.where(remask, self.mask_id, self.tokens).to(self.tokens.dtype)
            self.step_map = torch.where(remask, -1, self.step_map)
            self.entropies = torch.where(remask, 0.0, self.entropies)
            self._masked = self._masked | remask

    def _next_block(self, written: Tensor, stopped: Tensor) -> None:
        """Rows whose block is complete move to the next one that has a mask, or end."""
        any_left = self._masked.any(1)
        block_left = (self._masked & self._inside).any(1)
        block_step = self._block_step + 1
        going = self._active & ~stopped
        stuck = going & block_left & ~written.any(1)
        complete = ~block_left
        if self._chooser.steps is not None:
            due = block_step >= self._chooser.steps
            stuck, complete = stuck & due, complete & due
        self._stuck = stuck
        self._active = going & (any_left | ~complete)
        first = _first(self._masked)
        if self._sliding:
            self._start, self._block_step = first, block_step
        else:
            start = self._first + (first - self._first) // self._block * self._block
            self._start = torch.where(complete & any_left, start, self._start)
            self._block_step = torch.where(complete, 0, block_step)


def _first(flags: Tensor) -> Tensor:
    """Index of the first true flag of each row, 0 without one."""
    if flags.shape[1] == 0:
        return torch.zeros(flags.shape[0], dtype=torch.int64, device=flags.device)
    return flags.to(torch.uint8).argmax(1)


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
    return positions.to(tokens.device).expand(tokens.shape)

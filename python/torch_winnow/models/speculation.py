"""Speculative generation: a quick model drafts, the target reads all drafts in one pass.

A CAT needs no second model: with larger chunks the same weights are the draft, whose cache is
smaller and whose chunks turn less often.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_winnow.models.decoding import Decoding, check_sampling, draw, host_range
from torch_winnow.unmasking import speculative_verify

__all__ = ["Speculation", "speculative_sample"]


class Speculation(NamedTuple):
    """What :func:`speculative_sample` returns.

    Attributes:
        tokens: ``(B, num_tokens)`` int64.
        calls: passes of the target; one token at a time takes ``num_tokens - 1``.
        drafted: ``(B,)`` int64, drafts that were verified for each sequence.
        accepted: ``(B,)`` int64, how many of them were kept.
    """

    tokens: Tensor
    calls: int
    drafted: Tensor
    accepted: Tensor


@torch.inference_mode()
def speculative_sample(
    target: Decoding,
    draft: Decoding,
    num_tokens: int,
    *,
    draft_tokens: int = 4,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Speculation:
    """Draws ``num_tokens`` more tokens for every sequence, distributed as ``sample(target)``'s.

    Each round the draft proposes up to ``draft_tokens`` tokens per sequence; the target reads them
    in one pass, :func:`torch_winnow.unmasking.speculative_verify` accepts some and adds one, and
    what was rejected is taken back. Sequences accept different numbers and go on from there. Both
    end as after ``sample``: with all tokens but the last one of each sequence.

    Args:
        target: the sequences to continue.
        draft: the same sequences in another model, or in the same one at another chunk size. Its
            vocabulary and dtype are the target's.
        num_tokens: how many.
        draft_tokens: most drafts per round.
        temperature: of both; 0 takes the most likely token of the target, whatever the draft.
        generator: of all draws.

    Returns:
        :class:`Speculation`.

    Raises:
        ValueError: if the two hold sequences of different lengths, or an option is out of range.

    Example:
        >>> import torch
        >>> from torch_winnow.models import (
        ...     CATConfig, CompressAttendTransformer, StackConfig, speculative_sample)
        >>> small = StackConfig(width=32, depth=1, heads=2)
        >>> model = CompressAttendTransformer(CATConfig(small, small, chunk_sizes=(4, 16)))
        >>> prompt = torch.randint(256, (2, 21))
        >>> target, draft = (
        ...     model.start(
        ...         prompt,
        ...         model.block_pool(2, 41, chunk_size=size, draft_tokens=4),
        ...         chunk_size=size,
        ...     )
        ...     for size in (4, 16)
        ... )
        >>> result = speculative_sample(target, draft, 20, draft_tokens=3)
        >>> result.tokens.shape, result.calls < 20
        (torch.Size([2, 20]), True)
    """
    check_sampling(num_tokens, temperature, draft_tokens)
    if not torch.equal(target.lengths, draft.lengths):
        raise ValueError(
            f"draft: expected the target's sequences, of {target.lengths.tolist()} tokens, got "
            f"{draft.lengths.tolist()}"
        )
    start = target.lengths
    batch = len(start)
    tokens = torch.zeros((batch, num_tokens), dtype=torch.int64, device=target.logits.device)
    drafted, accepted = (torch.zeros(batch, dtype=torch.int64, device="cpu") for _ in range(2))
    calls = 0
    if not num_tokens or not batch:
        return Speculation(tokens, calls, drafted, accepted)

    def pending(decoding: Decoding, end: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens up to ``end`` that were drawn and that the decoding does not hold; how many."""
        begin = decoding.lengths - start
        counts = (end - begin).clamp(min=0)
        index = begin[:, None] + host_range(int(counts.max()))
        return tokens[host_range(batch)[:, None], index.clamp(max=num_tokens - 1)], counts

    tokens[:, 0] = draw(target.logits, temperature, generator)
    made = torch.ones(batch, dtype=torch.int64, device="cpu")
    while (left := num_tokens - made).any():
        active = left > 0
        # The target adds a token of its own to those that it accepts.
        lengths = (left - 1).clamp(0, draft_tokens)
        draft.extend(*pending(draft, torch.where(active, made, 0)))
        drafts, draft_logits = _propose(draft, lengths, temperature, generator)
        last, one = pending(target, torch.where(active, made, 0))
        before = target.lengths
        logits = target.extend(torch.cat((last, drafts), dim=1), one + lengths)
        step = speculative_verify(
            drafts,
            draft_logits,
            logits,
            temperature=temperature,
            lengths=lengths.to(logits.device),
            generator=generator,
        )
        found = torch.where(active, step.accepted.cpu(), 0)
        kept = found + active
        target.truncate_(before + kept)
        column = host_range(step.tokens.shape[1])
        row, place = (column < kept[:, None]).nonzero(as_tuple=True)
        tokens[row, made[row] + place] = step.tokens[row, place]
        made = made + kept
        calls += 1
        drafted += lengths
        accepted += found
    draft.extend(*pending(draft, torch.full_like(made, num_tokens - 1)))
    return Speculation(tokens, calls, drafted, accepted)


def _propose(
    draft: Decoding, lengths: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """``lengths[b]`` drafts of each sequence ``(B, T)``, and the logits that they were drawn from.

    The draft itself stays as it is: a fork goes ahead.
    """
    longest = int(lengths.max())
    drafts = torch.zeros((len(lengths), longest), dtype=torch.int64, device=draft.logits.device)
    logits = []
    for i in range(longest):
        if i == 0:
            ahead = draft.fork(range(len(lengths)))
        elif (lengths > i).all():
            ahead.step(drafts[:, i - 1])
        else:
            ahead.extend(drafts[:, i - 1 : i], (lengths > i).long())
        logits.append(ahead.logits)
        drafts[:, i] = draw(ahead.logits, temperature, generator)
    if temperature == 0 or not logits:
        return drafts, None  # chosen, not drawn
    return drafts, torch.stack(logits, dim=1)

"""Predictions of written tokens that do not see them; public in :mod:`torch_winnow.unmasking`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_winnow._unmasking.generate import logits_of
from torch_winnow._unmasking.results import StepContext
from torch_winnow._unmasking.step import in_window


class ShadowBlock:
    """Wraps a model so that its logits at written positions do not see the token there.

    WINO's shadow block (arXiv 2507.18578): the tokens are followed by one mask for each position of
    the block, with the same position id. Shadow j sees everything but the token at its own
    position, and the other shadows; nothing else sees the shadows. So a token that was written is
    predicted from all others in the same call that predicts the masks. For ``generate(...,
    rule=DraftVerify(), context=True)``.

    Args:
        model: maps tokens ``(B, L + D)``, ``attention_mask`` ``(B, 1, L + D, L + D)`` bool, true
            where row may attend column, and ``position_ids`` ``(B, L + D)`` to logits, or to an
            object whose ``logits`` they are.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model

    def __call__(self, tokens: Tensor, context: StepContext) -> Tensor:
        batch, length = tokens.shape
        size = min(context.block_length, length)
        device = tokens.device
        # Where the end cuts a window short its shadows begin earlier, and nothing sees the surplus.
        start = context.window[:, :1].clamp(max=length - size)
        place = start + torch.arange(size, device=device)
        shown = in_window(context.window, length).gather(1, place)

        itself = torch.eye(size, dtype=torch.bool, device=device)
        sees = torch.ones(batch, length + size, length + size, dtype=torch.bool, device=device)
        sees[:, :length, length:] = False
        own = torch.arange(length, device=device) == place[:, :, None]
        sees[:, length:, :length] = ~own
        sees[:, length:, length:] = shown[:, None, :] | itself
        everywhere = torch.arange(length, device=device).expand(batch, -1)
        output = self.model(
            F.pad(tokens, (0, size), value=context.mask_id),
            attention_mask=sees[:, None],
            position_ids=torch.cat([everywhere, place], 1),
        )
        logits = logits_of(output)
        if logits.dim() != 3 or logits.shape[:2] != (batch, length + size):
            raise ValueError(
                f"model: expected logits (B, L + D, V) with (B, L + D) = {(batch, length + size)}, "
                f"got {tuple(logits.shape)}"
            )
        # Masks keep their own logits: the shadows replace those of tokens only.
        index = place[:, :, None].expand(-1, -1, logits.shape[-1])
        plain = logits[:, :length]
        masked = (tokens.gather(1, place) == context.mask_id)[:, :, None]
        block = torch.where(masked, plain.gather(1, index), logits[:, length:])
        return plain.scatter(1, index, block)

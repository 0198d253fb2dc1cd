"""A tiny bidirectional transformer with random weights, for tests of decoding.

In float64, so that a row's logits are the same whatever else is in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyBidirectional(nn.Module):
    """One layer; masks as the public diffusion models take them: (B, S) or (B, 1, S, S)."""

    def __init__(self, vocab: int, *, width: int = 16, positions: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int, scale: float) -> nn.Parameter:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(scale * values)

        self.token = weight(vocab, width, scale=1.0)
        self.position = weight(positions, width, scale=1.0)
        self.query = weight(width, width, scale=0.3)
        self.key = weight(width, width, scale=0.3)
        self.value = weight(width, width, scale=0.5)
        self.head = weight(width, vocab, scale=1.0)

    def logits(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1]).expand(tokens.shape)
        hidden = self.token[tokens] + self.position[position_ids]
        score = (hidden @ self.query) @ (hidden @ self.key).mT
        if attention_mask is not None:
            shown = attention_mask.bool()
            shown = shown[:, None, :] if shown.dim() == 2 else shown[:, 0]
            score = score.masked_fill(~shown, -torch.inf)
        # A row that sees nothing, a padded one, gets zeros.
        mixed = score.softmax(-1).nan_to_num() @ (hidden @ self.value)
        return torch.tanh(hidden + mixed) @ self.head

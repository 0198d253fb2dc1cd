"""A masked diffusion model: a bidirectional transformer that fills in masked tokens.

Trained as LLaDA is (Nie et al., 2025, arXiv 2502.09992): a share t ~ U(0, 1] of the tokens is
masked, and the cross-entropy of the masked ones, weighted by 1/t, bounds the negative
log-likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_winnow.models.layers import Stack, StackConfig, attend_dense, check_tokens

__all__ = ["MaskedDiffusion", "MaskedDiffusionConfig"]


@dataclass(frozen=True)
class MaskedDiffusionConfig:
    """Shape of a :class:`MaskedDiffusion`.

    Attributes:
        stack: the bidirectional layers.
        vocab_size: number of token ids; the mask is the id after the last.
        max_tokens: longest sequence.
    """

    stack: StackConfig = field(default_factory=lambda: StackConfig(width=192, depth=4, heads=3))
    vocab_size: int = 256
    max_tokens: int = 1024


class MaskedDiffusion(nn.Module):
    """Predicts every token of a sequence in which some are ``mask_id``.

    Its logits cover the vocabulary without the mask, so the mask is never predicted.

    Example:
        >>> import torch
        >>> from torch_winnow.models import MaskedDiffusion, MaskedDiffusionConfig, StackConfig
        >>> config = MaskedDiffusionConfig(StackConfig(width=32, depth=1, heads=2))
        >>> model = MaskedDiffusion(config)
        >>> model(torch.full((2, 10), model.mask_id)).shape
        torch.Size([2, 10, 256])
    """

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.stack.width
        self.embedding = nn.Embedding(config.vocab_size + 1, width)
        self.stack = Stack(config.stack, config.max_tokens)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.1 * width**-0.5)

    @property
    def mask_id(self) -> int:
        """The id after the last token's."""
        return self.config.vocab_size

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, L, V)`` of tokens ``(B, L)``, masked positions holding ``mask_id``.

        Raises:
            ValueError: if ``tokens`` is not ``(B, L)`` ids up to ``mask_id``, or L is above
                ``max_tokens``.
        """
        tokens = check_tokens(tokens, self.config.vocab_size + 1, self.config.max_tokens)
        hidden = self.stack(self.embedding(tokens), slice(0, tokens.shape[1]), _bidirectional)
        return self.head(hidden)  # type: ignore[no-any-return]

    def loss(
        self,
        tokens: Tensor,
        *,
        most: float = 1.0,
        weighted: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Nats per token of the masked tokens, a share t ~ U(0, ``most``] of them masked.

        With ``most=1`` and weights 1/t it estimates a bound on the negative log-likelihood. The
        plain mean over masked tokens has far less variance, and a smaller ``most`` spends the
        budget on texts of which much is given: both help where training is short.

        The shares t are spread evenly over the batch from one random offset (as in Sahoo et al.,
        2024): the same expectation as independent draws, at less variance.

        Args:
            tokens: ``(B, L)``, complete.
            most: the largest share.
            weighted: by 1/t, else the mean over masked tokens.
            generator: of the shares and masks.

        Returns:
            One number.

        Raises:
            ValueError: if ``most`` is not in (0, 1].
        """
        if not 0 < most <= 1:
            raise ValueError(f"most: expected a share in (0, 1], got {most}")
        batch, length = tokens.shape
        draws = torch.rand(batch * length + 1, generator=generator, device=tokens.device)
        spread = torch.arange(batch, device=tokens.device) / batch
        share = most * (1 - (draws[-1] + spread) % 1).unsqueeze(1)  # in (0, most]
        masked = draws[:-1].view(batch, length) < share
        logits = self(torch.where(masked, self.mask_id, tokens))
        # Only the masked rows count, and their number varies: selecting them saves the rest.
        surprise = F.cross_entropy(logits[masked].float(), tokens[masked].long(), reduction="none")
        if weighted:
            return (surprise / share.expand_as(masked)[masked]).sum() / (batch * length)
        return surprise.sum() / masked.sum().clamp(min=1)


def _bidirectional(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend_dense(query, key, value, causal=False)

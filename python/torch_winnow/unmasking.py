"""Parallel decoding of masked diffusion models.

A masked diffusion language model predicts every masked position at once. How many of them to
accept per call, and which, decides both quality and speed. Multi-token entropy decoding
(:class:`EntropyThreshold`, arXiv 2510.19990) accepts all positions that the model is sure of and
needs about a third of the calls of one-at-a-time decoding at equal quality; use it by default, with
a threshold of about 0.2 nats.

- :func:`logit_stats`: token, confidence, margin, entropy of each row from one read of the logits.
- :func:`linear_logit_stats`: the same from hidden states, without the logits.
- :func:`merge_logit_stats`: the same from parts of the vocabulary, bit for bit.
- :func:`select_positions`: which positions a rule accepts.
- :func:`unmask_step_`: both, and the tokens written in place.
- :func:`generate`: the loop around a model, block by block; :data:`presets` holds the published
  samplers with their defaults, :class:`Decoding` serves loops of one's own.
- :class:`Template`: prompts with named spans to fill in, and :func:`score_span`, how likely one is.
- :func:`speculative_verify`: drafted tokens become an exact sample of a target model.
- :func:`soft_embedding`: masked positions as mixtures of embeddings, for latent refinement.
"""

from __future__ import annotations

from torch_winnow._unmasking import presets
from torch_winnow._unmasking.decoding import Decoding, DecodingStatus
from torch_winnow._unmasking.generate import generate
from torch_winnow._unmasking.history_rules import (
    DraftVerify,
    FirstHitting,
    KLStability,
    Remasking,
)
from torch_winnow._unmasking.linear import linear_logit_stats
from torch_winnow._unmasking.logit_stats import LogitStats, logit_stats
from torch_winnow._unmasking.merge import merge_logit_stats
from torch_winnow._unmasking.results import (
    AnswerEntropy,
    GenerateResult,
    StepContext,
    StepResult,
)
from torch_winnow._unmasking.rules import (
    ConfidenceFactor,
    ConfidenceThreshold,
    EntropyBound,
    EntropyThreshold,
    PrefixThreshold,
    TopK,
    select_positions,
)
from torch_winnow._unmasking.shadow import ShadowBlock
from torch_winnow._unmasking.soft_embedding import soft_embedding
from torch_winnow._unmasking.step import unmask_step_
from torch_winnow._unmasking.template import SpanScore, Template, score_span
from torch_winnow._unmasking.verification import Verification, speculative_verify

__all__ = [
    "AnswerEntropy",
    "ConfidenceFactor",
    "ConfidenceThreshold",
    "Decoding",
    "DecodingStatus",
    "DraftVerify",
    "EntropyBound",
    "EntropyThreshold",
    "FirstHitting",
    "GenerateResult",
    "KLStability",
    "LogitStats",
    "PrefixThreshold",
    "Remasking",
    "ShadowBlock",
    "SpanScore",
    "StepContext",
    "StepResult",
    "Template",
    "TopK",
    "Verification",
    "generate",
    "linear_logit_stats",
    "logit_stats",
    "merge_logit_stats",
    "presets",
    "score_span",
    "select_positions",
    "soft_embedding",
    "speculative_verify",
    "unmask_step_",
]

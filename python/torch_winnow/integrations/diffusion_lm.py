"""Public diffusion language models, decoded with the rules of :mod:`torch_winnow.unmasking`.

LLaDA (``LLaDAModelLM``) and Dream (``DreamModel``), loaded with ``trust_remote_code=True``: where
their sampler was called, call :func:`decode` ::

    model.diffusion_generate(input_ids, attention_mask=mask, max_new_tokens=256, alg="entropy")
    decode(model, input_ids, attention_mask=mask, max_new_tokens=256, **presets.med())

transformers' own ``DiffusionGemmaForBlockDiffusion`` refines a canvas of tokens instead of masks:
:func:`use_rule` gives its ``generate`` another rule for what to accept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_winnow._unmasking.arguments import choice, integer
from torch_winnow._unmasking.logit_stats import check_tensor
from torch_winnow._unmasking.rules import check_rule
from torch_winnow._unmasking.step import score_of
from torch_winnow.unmasking import (
    GenerateResult,
    TopK,
    generate,
    logit_stats,
    select_positions,
)

__all__ = ["DiffusionLM", "decode", "use_rule"]

_LLADA_MASK_ID = 126336  # of the released checkpoints


class DiffusionLM:
    """A LLaDA or Dream model as :func:`torch_winnow.unmasking.generate` calls it.

    ``generate(lm, tokens, mask_id=lm.mask_id, shift=lm.shift, ...)``, for infilling templates or
    anything else than a prompt and its continuation; for those there is :func:`decode`.

    Args:
        model: a model with a ``config``, on the device of the tokens.
        attention_mask: ``(B, L)``, 0 where a token is padding; None without any.
        architecture: ``"llada"`` or ``"dream"``; None to read it from ``config.model_type``.

    Attributes:
        mask_id: from the model's ``config``.
        shift: whether the logits at a position predict the next one, as Dream's do.
    """

    def __init__(
        self, model: Any, *, attention_mask: Tensor | None = None, architecture: str | None = None
    ) -> None:
        config = getattr(model, "config", None)
        if config is None:
            raise ValueError(f"model: expected one with a config, got {type(model).__name__}")
        if architecture is None:
            kind = str(getattr(config, "model_type", "")).lower()
            architecture = "llada" if kind.startswith("llada") else kind
            if architecture not in ("llada", "dream"):
                raise ValueError(
                    "architecture: expected 'llada' or 'dream', as config.model_type is "
                    f"{getattr(config, 'model_type', None)!r}, got None"
                )
        choice("architecture", architecture, ("llada", "dream"))
        self.model = model
        self.shift = architecture == "dream"
        mask_id = getattr(config, "mask_token_id", None)
        if mask_id is None and not self.shift:
            mask_id = _LLADA_MASK_ID
        self.mask_id = integer("config.mask_token_id", mask_id)
        if attention_mask is not None and bool((attention_mask != 0).all()):
            attention_mask = None
        self.attention_mask = attention_mask

    def __call__(self, tokens: Tensor) -> Tensor:
        padding = self._padding(tokens)
        if not self.shift:
            output = self.model(tokens, attention_mask=padding)
        elif padding is None:
            output = self.model(tokens, "full", None)
        else:  # Dream takes which pairs see each other, and positions that count no padding
            real = padding != 0
            place = (real.long().cumsum(-1) - 1).masked_fill(~real, 1)
            output = self.model(tokens, real[:, None, None, :] & real[:, None, :, None], place)
        logits: Tensor = output.logits
        return logits

    def _padding(self, tokens: Tensor) -> Tensor | None:
        if self.attention_mask is None:
            return None
        if self.attention_mask.shape[1:] != tokens.shape[1:]:
            raise ValueError(
                f"attention_mask: expected (B, L) with L={tokens.shape[1]}, got "
                f"{tuple(self.attention_mask.shape)}"
            )
        # Guidance doubles the batch: the tokens, then the same without what was given.
        return self.attention_mask.repeat(len(tokens) // max(len(self.attention_mask), 1), 1)


def decode(
    model: Any,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    architecture: str | None = None,
    **generate_options: Any,
) -> GenerateResult:
    """Continues prompts with a LLaDA or Dream model: ``max_new_tokens`` masks are filled.

    Args:
        model, architecture: as in :class:`DiffusionLM`.
        input_ids: ``(B, P)`` prompts, padded on the left by anything but the mask.
        max_new_tokens: how many masks to append and fill.
        attention_mask: ``(B, P)``, 0 where a prompt is padded.
        generate_options: ``rule`` and all else of :func:`torch_winnow.unmasking.generate`, for
            instance one of its ``presets``.

    Returns:
        :class:`GenerateResult`; its ``tokens (B, P + max_new_tokens)`` begin with the prompts.

    Raises:
        ValueError: for a model that is neither, or a wrong shape or option.
    """
    count = integer("max_new_tokens", max_new_tokens, 0)
    for name in ("mask_id", "shift"):
        if name in generate_options:
            raise ValueError(f"{name}: follows from the model, so decode does not take it")
    if generate_options.get("context"):
        raise ValueError("context: expected False, as these models take tokens alone, got True")
    check_tensor("input_ids", input_ids)
    lm = DiffusionLM(model, architecture=architecture)
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected {tuple(input_ids.shape)} as in input_ids, got "
                f"{tuple(attention_mask.shape)}"
            )
        if bool(((attention_mask == 0) & (input_ids == lm.mask_id)).any()):
            raise ValueError(
                "input_ids: expected another padding than the mask, which is filled, got "
                f"{lm.mask_id}"
            )
        attention_mask = F.pad(attention_mask, (0, count), value=1)
        lm = DiffusionLM(model, attention_mask=attention_mask, architecture=architecture)
    tokens = F.pad(input_ids, (0, count), value=lm.mask_id)
    return generate(lm, tokens, mask_id=lm.mask_id, shift=lm.shift, **generate_options)


def use_rule(model: Any, rule: Any) -> None:
    """Lets a ``DiffusionGemmaForBlockDiffusion`` accept tokens of its canvas by a rule.

    ``model.generate`` then works as before, but for the choice of which drawn tokens are kept at
    each denoising step. ``EntropyBound`` is the model's own sampler; the rest is drawn anew.

    Args:
        model: the model; changed in place.
        rule: one of the rule classes of :mod:`torch_winnow.unmasking` for single steps, ``TopK``
            with one number; None for the model's own sampler.

    Raises:
        ValueError: for another model or rule.
    """
    if not hasattr(type(model), "_prepare_sampler"):
        raise ValueError(
            f"model: expected a DiffusionGemmaForBlockDiffusion, got {type(model).__name__}"
        )
    vars(model).pop("_compiled_accept_canvas", None)  # of the sampler before
    vars(model).pop("_prepare_sampler", None)
    if rule is None:
        return
    check_rule(rule)
    if isinstance(rule, TopK) and len(rule.schedule()) > 1:
        raise ValueError(f"rule: expected TopK with one number, got {rule}")

    def prepare_sampler(generation_config: Any) -> Any:
        sampler = type(model)._prepare_sampler(model, generation_config)

        def accept_canvas(
            current_canvas: Tensor, denoiser_canvas: Tensor, logits: Tensor, cur_step: Any
        ) -> Tensor:
            stats = logit_stats(logits, target_ids=denoiser_canvas)
            if rule.score == "random":
                score = torch.rand(denoiser_canvas.shape, device=logits.device)
            elif rule.score == "confidence":
                assert stats.target_log_prob is not None
                score = stats.target_log_prob.exp()
            else:
                score = score_of(stats, rule)
            everywhere = torch.ones_like(denoiser_canvas, dtype=torch.bool)
            sampler.accepted_token_mask, _ = select_positions(score, everywhere, rule)
            return torch.where(sampler.accepted_token_mask, denoiser_canvas, current_canvas)

        sampler.accept_canvas = accept_canvas
        return sampler

    model._prepare_sampler = prepare_sampler

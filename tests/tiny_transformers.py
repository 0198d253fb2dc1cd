"""Tiny random models of transformers, sharp enough that a wrong key changes their tokens."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from torch_winnow.integrations.transformers import register

register()

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
WINDOWS = ["sliding_attention", "full_attention"]

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=6,
            layer_types=WINDOWS,
            attn_logit_softcapping=2.0,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=6, layer_types=WINDOWS
        )
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **SIZES,
            head_dim=16,
            sliding_window=6,
            layer_types=WINDOWS,
            num_local_experts=2,
            num_experts_per_tok=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
}
# What SDPA lacks, eager defines.
DEFINITION = {"gemma2": "eager", "gpt_oss": "eager"}


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts with 4, 0 and 9 columns of left padding."""
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = 0
    mask[2, :9] = 0
    return torch.randint(1, 64, (3, 11), generator=torch.Generator().manual_seed(1)) * mask, mask

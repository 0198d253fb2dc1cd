"""Tiny random copies of public diffusion language models, token for token against their samplers.

The copies take what the public classes take: LLaDA a (B, L) padding mask, Dream "full" or a
(B, 1, L, L) mask and position ids, with logits that predict the next position.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tiny_diffusion import TinyBidirectional
from torch_winnow.integrations.diffusion_lm import DiffusionLM, decode, use_rule
from torch_winnow.unmasking import (
    ConfidenceThreshold,
    EntropyBound,
    EntropyThreshold,
    KLStability,
    Template,
    TopK,
    generate,
    presets,
)

VOCAB = 24
MASK = VOCAB - 1


class LLaDAModelLM(TinyBidirectional):
    def __init__(self):
        super().__init__(VOCAB)
        self.config = SimpleNamespace(model_type="llada", mask_token_id=MASK)

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, **_):
        assert attention_mask is None or attention_mask.shape == input_ids.shape
        return SimpleNamespace(logits=quiet(self.logits(input_ids, attention_mask)))


class DreamModel(TinyBidirectional):
    def __init__(self):
        super().__init__(VOCAB)
        self.config = SimpleNamespace(model_type="Dream", mask_token_id=MASK)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **_):
        if isinstance(attention_mask, str):
            assert attention_mask == "full"
            attention_mask = None
        else:
            assert attention_mask.shape[1:] == (1, input_ids.shape[1], input_ids.shape[1])
        return SimpleNamespace(logits=quiet(self.logits(input_ids, attention_mask, position_ids)))


def quiet(logits):
    """Neither published sampler means to write the mask."""
    logits[..., MASK] = -100.0
    return 2.5 * logits


def prompts(batch, padded):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, MASK, (batch, 7), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for b in range(batch):
            mask[b, : 2 * b] = 0
    return ids, mask


@torch.no_grad()
def llada_sampler(model, prompt, mask, steps, gen_length, block_length, cfg_scale=0.0):
    """LLaDA's published loop, whole batch, at temperature 0."""
    batch, start = prompt.shape
    x = torch.full((batch, start + gen_length), MASK)
    x[:, :start] = prompt
    mask = torch.cat([mask, torch.ones(batch, gen_length, dtype=mask.dtype)], 1)
    given = x != MASK
    blocks = gen_length // block_length
    steps = steps // blocks
    for block in range(blocks):
        end = start + (block + 1) * block_length
        for step in range(steps):
            logits = model(x, attention_mask=mask).logits
            if cfg_scale > 0:
                free = model(x.masked_fill(given, MASK), attention_mask=mask).logits
                logits = free + (cfg_scale + 1) * (logits - free)
            p, token = logits.softmax(-1).max(-1)
            p[x != MASK] = -torch.inf
            p[:, end:] = -torch.inf
            for b in range(batch):
                count = block_length // steps + (1 if step < block_length % steps else 0)
                for i in p[b].topk(count).indices:
                    x[b, i] = token[b, i]
    return x


@torch.no_grad()
def dream_sampler(model, prompt, mask, steps, max_new_tokens, alg):
    """Dream's published loop at temperature 0."""
    batch = len(prompt)
    x = torch.nn.functional.pad(prompt, (0, max_new_tokens), value=MASK)
    place, shown = None, "full"
    if bool((mask == 0).any()):
        whole = torch.nn.functional.pad(mask, (0, max_new_tokens), value=1)
        place = whole.cumsum(-1) - 1
        place[whole == 0] = 1
        shown = torch.logical_and(whole[:, None, None, :], whole[:, None, :, None])
    time = torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        logits = model(x, shown, place).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        p = logits.softmax(-1)
        top, token = p.topk(2)
        score = {
            "maskgit_plus": top[..., 0],
            "topk_margin": top[..., 0] - top[..., 1],
            "entropy": (p * torch.log(p + 1e-10)).sum(-1),
        }[alg]
        masked = x == MASK
        left = masked.sum() / batch
        share = 1 - time[i + 1] / time[i]
        count = int(left * share) if i < steps - 1 else int(left)
        score = score.masked_fill(~masked, -torch.inf)
        for b in range(batch):
            for j in score[b].topk(count).indices:
                x[b, j] = token[b, j, 0]
    return x


@pytest.mark.parametrize(("batch", "padded"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize(("steps", "block", "cfg"), [(16, 16, 0.0), (8, 8, 0.0), (16, 4, 1.5)])
def test_llada(batch, padded, steps, block, cfg):
    model = LLaDAModelLM()
    ids, mask = prompts(batch, padded)
    expected = llada_sampler(model, ids, mask, steps, 16, block, cfg)
    sampler = presets.llada(gen_length=16, steps=steps, block_length=block, cfg_scale=cfg)
    result = decode(model, ids, attention_mask=mask, max_new_tokens=16, **sampler)
    assert torch.equal(result.tokens, expected)
    assert result.calls == steps


@pytest.mark.parametrize(("batch", "padded"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize("steps", [5, 40])
def test_dream(batch, padded, alg, steps):
    model = DreamModel()
    ids, mask = prompts(batch, padded)
    expected = dream_sampler(model, ids, mask, steps, 16, alg)
    sampler = presets.dream(gen_length=16, steps=steps, alg=alg)
    result = decode(model, ids, attention_mask=mask, max_new_tokens=16, **sampler)
    assert torch.equal(result.tokens, expected)
    assert result.calls <= min(steps, 16)


@pytest.mark.parametrize("make", [LLaDAModelLM, DreamModel])
def test_every_rule_decodes_the_public_models(make):
    model = make()
    ids, mask = prompts(2, True)
    one = decode(model, ids, attention_mask=mask, max_new_tokens=16, rule=TopK(1))
    for sampler in (
        presets.med(threshold=1.0),
        presets.fast_dllm(threshold=0.5, block_length=8),
        presets.eb(gamma=1.0),
        {"rule": KLStability(0.4, 0.5)},
    ):
        result = decode(model, ids, attention_mask=mask, max_new_tokens=16, **sampler)
        assert torch.equal(result.tokens[:, :7], ids)
        assert not (result.tokens == MASK).any()
        assert result.calls < one.calls


def test_templates_of_a_public_model():
    lm = DiffusionLM(DreamModel())
    parts = Template([[1, 2], ("reasoning", 6), [3], ("answer", 2)], mask_id=lm.mask_id)
    tokens = parts.fill(answer=[4, 5])[None]
    result = generate(lm, tokens, mask_id=lm.mask_id, shift=lm.shift, rule=EntropyThreshold(0.2))
    assert parts.read(result.tokens, "answer").tolist() == [[4, 5]]
    assert not (result.tokens == MASK).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": True}, "shift: follows from the model"),
        ({"mask_id": 3}, "mask_id: follows from the model"),
        ({"input_ids": [[1]]}, r"input_ids: expected a tensor, got \[\[1\]\]"),
        ({"attention_mask": [[1]]}, r"attention_mask: expected a tensor, got \[\[1\]\]"),
        (presets.wino(), "context: expected False, as these models take tokens alone"),
        ({"model": len}, "model: expected one with a config, got builtin"),
        (
            {
                "input_ids": torch.tensor([[MASK, 1]]),
                "attention_mask": torch.tensor([[0, 1]]),
            },
            f"input_ids: expected another padding than the mask, which is filled, got {MASK}",
        ),
    ],
)
def test_decode_names_what_is_wrong(options, message):
    arguments = {"model": LLaDAModelLM(), "input_ids": torch.ones(1, 2).long(), "rule": TopK(1)}
    with pytest.raises(ValueError, match=message):
        decode(**{**arguments, "max_new_tokens": 3, **options})


def test_what_is_no_such_model_is_named():
    other = SimpleNamespace(config=SimpleNamespace(model_type="llama", mask_token_id=3))
    with pytest.raises(ValueError, match="architecture: expected 'llada' or 'dream', as config"):
        DiffusionLM(other)
    with pytest.raises(ValueError, match="architecture: expected one of llada, dream, got 'x'"):
        DiffusionLM(other, architecture="x")
    assert DiffusionLM(other, architecture="llada").mask_id == 3
    released = SimpleNamespace(config=SimpleNamespace(model_type="llada"))
    assert DiffusionLM(released).mask_id == 126336
    ids, mask = prompts(2, True)
    with pytest.raises(ValueError, match=r"attention_mask: expected \(2, 7\) as in input_ids"):
        decode(LLaDAModelLM(), ids, attention_mask=mask[:1], max_new_tokens=2, rule=TopK(1))
    with pytest.raises(ValueError, match=r"attention_mask: expected .* L=7, got \(2, 5\)"):
        DiffusionLM(LLaDAModelLM(), attention_mask=mask[:, :5])(ids)
    with pytest.raises(ValueError, match="model: expected a DiffusionGemmaForBlockDiffusion, got"):
        use_rule(LLaDAModelLM(), TopK(1))


@pytest.fixture(scope="module")
def gemma():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DiffusionGemmaForBlockDiffusion"):
        pytest.skip("this transformers has no DiffusionGemma")
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
    text = transformers.DiffusionGemmaTextConfig(
        **small,
        vocab_size=64,
        num_hidden_layers=2,
        num_key_value_heads=1,
        global_head_dim=16,
        max_position_embeddings=128,
        sliding_window=16,
        num_experts=2,
        top_k_experts=1,
        moe_intermediate_size=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    vision = transformers.Gemma4VisionConfig(**small, num_hidden_layers=1, num_key_value_heads=2)
    config = transformers.DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=8,
        boi_token_id=60,
        eoi_token_id=61,
        image_token_id=62,
    )
    torch.manual_seed(0)
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # tied: distributions with something to say
    return model


def continued(model):
    torch.manual_seed(3)
    ids = torch.randint(3, 50, (2, 5))
    return model.generate(
        ids, max_new_tokens=16, max_denoising_steps=6, eos_token_id=None
    ).sequences


def test_diffusion_gemma(gemma):
    """With its own rule the model writes the same tokens; with another, others."""
    own = continued(gemma)
    bound = gemma.generation_config.to_dict().get("sampler_config")
    gamma = 0.1 if bound is None else bound["entropy_bound"]
    use_rule(gemma, EntropyBound(gamma))
    assert torch.equal(continued(gemma), own)
    different = 0
    for rule in (ConfidenceThreshold(0.3), TopK(2, score="margin"), TopK(1, score="random")):
        use_rule(gemma, rule)
        sequences = continued(gemma)
        assert sequences.shape == own.shape
        different += int(not torch.equal(sequences, own))
    assert different > 0
    use_rule(gemma, None)
    assert torch.equal(continued(gemma), own)
    with pytest.raises(ValueError, match="rule: expected TopK with one number"):
        use_rule(gemma, TopK((2, 1)))
    with pytest.raises(ValueError, match="rule: expected EntropyThreshold.* got KLStability"):
        use_rule(gemma, KLStability())

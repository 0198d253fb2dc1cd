"""Rules that look at more than one step, against their definitions."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from torch_winnow import reference
from torch_winnow._unmasking.choosers import uniforms
from torch_winnow.unmasking import (
    AnswerEntropy,
    Decoding,
    DraftVerify,
    EntropyThreshold,
    FirstHitting,
    KLStability,
    PrefixThreshold,
    Remasking,
    TopK,
    generate,
)

VOCAB = 40
MASK = VOCAB - 1


@pytest.fixture
def model():
    """Logits that depend on all tokens of the row, so that a position's change as others do."""
    wide = {"dtype": torch.float64}
    table = 3 * torch.randn(VOCAB, VOCAB, **wide)
    place = 2 * torch.randn(64, VOCAB, **wide)
    mix = torch.randn(64, 64, **wide) / 6

    def run(tokens):
        length = tokens.shape[1]
        logits = mix[:length, :length] @ table[tokens] + place[:length]
        logits[..., MASK] = 50.0
        return logits

    return run


def prompt(batch=3, length=23):
    tokens = torch.randint(0, MASK, (batch, length))
    tokens[torch.rand(batch, length) < 0.8] = MASK
    tokens[0, :5] = 3
    return tokens


@pytest.mark.parametrize(
    "rule",
    [
        KLStability(0.3, 0.5),
        KLStability(0.2, 1.0, history=1, num_tokens=2),
        KLStability(0.0, 3.0, history=3),
        DraftVerify(0.3, 0.6),
        DraftVerify(0.1, 0.95),
    ],
    ids=str,
)
@pytest.mark.parametrize("block_length", [None, 7])
def test_generate_matches_definition(rule, block_length, model):
    tokens = prompt()
    options = {"mask_id": MASK, "rule": rule, "block_length": block_length}
    result = generate(model, tokens, **options)
    expected = reference.generate(model, tokens, **options)
    assert torch.equal(result.tokens, expected.tokens)
    assert torch.equal(result.step_map, expected.step_map)
    assert result.calls == expected.calls
    torch.testing.assert_close(result.entropies, expected.entropies, rtol=1e-4, atol=1e-4)
    assert torch.equal(result.step_map == -1, tokens != MASK)
    for row in range(len(tokens)):  # whatever else is in the batch
        alone = generate(model, tokens[row : row + 1], **options)
        assert torch.equal(alone.tokens[0], result.tokens[row])


@pytest.mark.parametrize("seed", range(40))
def test_any_combination_matches_definition(seed, model):
    choose = random.Random(seed)
    chance = choose.random
    batch, length = choose.randint(0, 3), choose.randint(0, 18)
    tokens = torch.randint(0, MASK, (batch, length))
    tokens[torch.rand(batch, length) < chance()] = MASK
    rule = choose.choice(
        [
            KLStability(chance(), 3 * chance(), choose.randint(1, 3), choose.randint(1, 3)),
            DraftVerify(chance(), chance()),
            EntropyThreshold(2 * chance(), order=choose.choice(["any", "left_to_right"])),
            PrefixThreshold(chance()),
            TopK((3, 1, 2)),
        ]
    )
    options = {"mask_id": MASK, "rule": rule, "block_length": choose.choice([None, 1, 3, 5, 30])}
    if not isinstance(rule, DraftVerify):
        options |= choose.choice([{}, {"sliding": True}, {"steps": choose.randint(1, 6)}])
    if not isinstance(rule, KLStability):
        options |= choose.choice([{}, {"cfg_scale": 1.0}])
    if chance() < 0.4:
        options["stop"] = AnswerEntropy(torch.rand(length) < 0.2, 4 * chance())
    options |= choose.choice([{}, {"shift": True}, {"top_k": 4}])
    result = generate(model, tokens, **options)
    expected = reference.generate(model, tokens, **options)
    assert torch.equal(result.tokens, expected.tokens)
    assert torch.equal(result.step_map, expected.step_map)
    assert result.calls == expected.calls


def test_the_rules_do_what_they_are_for(model):
    """Stability writes several at once, verification takes tokens back."""
    tokens = torch.full((2, 40), MASK)
    slow = generate(model, tokens, mask_id=MASK, rule=TopK(1)).calls
    assert generate(model, tokens, mask_id=MASK, rule=KLStability(0.3, 0.5)).calls < slow
    decoding = Decoding(tokens, mask_id=MASK, rule=DraftVerify(0.1, 0.95))
    written = taken_back = 0
    while decoding.status().unfinished:
        before = decoding.tokens
        decoding.advance(model(before))
        written += int(((before == MASK) & (decoding.tokens != MASK)).sum())
        taken_back += int(((before != MASK) & (decoding.tokens == MASK)).sum())
    assert taken_back > 0
    assert written - taken_back == 80


def test_stability_boundaries_are_strict():
    """Both sides of the definition: KL < threshold for `history` steps, confidence > threshold."""
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25]] * 3]))

    def run(rule):
        tokens = torch.full((1, 3), 3)
        return generate(lambda _: logits.clone(), tokens, mask_id=3, rule=rule).step_map[0].tolist()

    assert run(KLStability(0.499, 1e-6)) == [0, 1, 2]  # ready at the third call: one is left
    assert run(KLStability(0.499, 1e-6, history=1)) == [0, 1, 1]
    assert run(KLStability(0.5, 1e-6, history=1)) == [0, 1, 2]
    assert run(KLStability(0.499, 0.0, history=1)) == [0, 1, 2]


def test_verification_boundaries():
    """Confidence > draft, probability < verify, fewer taken back than written before."""
    sure, half = torch.tensor([9.0, 0, 0, 0]), torch.log(torch.tensor([0.5, 0.25, 0.25, 1e-9]))

    def model(tokens):
        logits = sure.expand(1, 6, 4).clone()
        if (tokens != 3).sum() >= 3:  # now the first three are doubted
            logits[:, :3] = half
        return logits

    def steps(rule):
        decoding = Decoding(torch.full((1, 6), 3), mask_id=3, rule=rule)
        counts = []
        while decoding.status().unfinished:
            decoding.advance(model(decoding.tokens))
            counts.append(int((decoding.tokens != 3).sum()))
        return counts

    # Six masks allow max(5, 4) = 5 at once; the sixth comes alone, so nothing is taken back.
    assert steps(DraftVerify(0.6, 0.9)) == [5, 6]
    assert steps(DraftVerify(1.0, 0.9)) == [1, 2, 3, 4, 5, 6]


def test_a_model_that_overwrites_its_logits_is_noticed():
    buffer = torch.randn(1, 4, 5)
    with pytest.raises(RuntimeError, match="model: expected new logits at every call"):
        generate(lambda _: buffer, torch.full((1, 4), 5), mask_id=5, rule=KLStability())


def test_sliding_windows(model):
    tokens = prompt()
    options = {"mask_id": MASK, "rule": PrefixThreshold(0.3), "block_length": 4, "sliding": True}
    result = generate(model, tokens, **options)
    expected = reference.generate(model, tokens, **options)
    assert torch.equal(result.tokens, expected.tokens)
    assert torch.equal(result.step_map, expected.step_map)
    grid = generate(model, tokens, **{**options, "sliding": False})
    assert result.calls <= grid.calls


def test_steps_that_change_nothing_need_no_call():
    calls = []

    def model(tokens):
        calls.append(tokens.clone())
        return torch.zeros(*tokens.shape, 5)

    result = generate(model, torch.full((2, 4), 5), mask_id=5, rule=Remasking(200), seed=2)
    assert result.calls == len(calls) <= 8
    assert not (result.tokens == 5).any()
    assert result.step_map.max() > 20
    for one, other in itertools.pairwise(calls):
        assert not torch.equal(one, other)


def test_context_says_what_changed():
    seen = []

    def model(tokens, context):
        seen.append((tokens, context))
        return torch.randn(*tokens.shape, 5)

    tokens = torch.full((2, 6), 5)
    tokens[1, 2:] = 0
    generate(model, tokens, mask_id=5, rule=TopK(1), block_length=3, context=True)
    assert seen[0][1].changed.all()
    for (before, _), (after, context) in itertools.pairwise(seen):
        assert torch.equal(context.changed, before != after)
    windows = [context.window[0].tolist() for _, context in seen]
    assert windows == [[0, 3]] * 3 + [[3, 6]] * 3
    assert [context.active[1].item() for _, context in seen] == [True] * 2 + [False] * 4
    assert seen[0][1].time is None
    assert seen[0][1].mask_id == 5


def test_guidance_is_on_the_tokens_that_were_given(model):
    tokens = prompt()
    rule = EntropyThreshold(0.5)
    guided = generate(model, tokens, mask_id=MASK, rule=rule, cfg_scale=1.5)
    given = tokens != MASK

    def by_hand(tokens):
        conditional, free = model(tokens), model(tokens.masked_fill(given, MASK))
        return free + 2.5 * (conditional - free)

    expected = generate(by_hand, tokens, mask_id=MASK, rule=rule)
    assert torch.equal(guided.tokens, expected.tokens)
    assert torch.equal(guided.step_map, expected.step_map)
    definition = reference.generate(model, tokens, mask_id=MASK, rule=rule, cfg_scale=1.5)
    assert torch.equal(guided.tokens, definition.tokens)
    with pytest.raises(ValueError, match="context: expected False with cfg_scale"):
        generate(model, tokens, mask_id=MASK, rule=rule, cfg_scale=1.5, context=True)


def test_progress_counts_tokens(model, capsys, monkeypatch):
    tokens = prompt()
    generate(model, tokens, mask_id=MASK, rule=EntropyThreshold(0.5), progress=True)
    masks = int((tokens == MASK).sum())
    assert f"{masks}/{masks}" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="progress: expected tqdm to be installed"):
        generate(model, tokens, mask_id=MASK, rule=TopK(1), progress=True)


def test_uniforms_are_uniform_and_keyed():
    u = uniforms(torch.tensor(7), 300, 200)
    assert u.dtype == torch.float64
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / u.numel()) ** 0.5
    assert abs(torch.corrcoef(u.T[:2])[0, 1]) < 4 / 300**0.5
    assert torch.equal(u[:20, :30], uniforms(torch.tensor(7), 20, 30))
    assert not torch.equal(u, uniforms(torch.tensor(8), 300, 200))
    assert u.unique().numel() == u.numel()


def test_nan_rows_are_reported_under_every_rule():
    logits = torch.zeros(2, 3, 5)
    logits[1] = float("nan")
    for rule in (KLStability(), DraftVerify(), Remasking(4), FirstHitting()):
        with pytest.raises(RuntimeError, match="every masked position of row 1 has NaN"):
            generate(lambda _: logits.clone(), torch.full((2, 3), 4), mask_id=4, rule=rule, seed=0)


@pytest.mark.parametrize(
    "rule", [KLStability(), DraftVerify(0.1, 0.9), Remasking(6, 0.2), FirstHitting()], ids=str
)
def test_any_integer_any_dtype_and_nothing_at_all(rule, model):
    tokens = prompt()
    wide = generate(model, tokens, mask_id=MASK, rule=rule, seed=3)
    narrow = generate(
        lambda t: model(t.long()), tokens.to(torch.int32), mask_id=MASK, rule=rule, seed=3
    )
    assert narrow.tokens.dtype == torch.int32
    assert torch.equal(narrow.tokens, wide.tokens.to(torch.int32))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        result = generate(lambda t, d=dtype: model(t).to(d), tokens, mask_id=MASK, rule=rule)
        assert not (result.tokens == MASK).any()
    for shape in ((0, 3), (2, 0), (0, 0)):
        nothing = generate(model, torch.zeros(shape, dtype=torch.int64), mask_id=MASK, rule=rule)
        assert nothing.tokens.shape == shape
        assert nothing.calls == 0
    assert generate(model, torch.ones(2, 3).long(), mask_id=MASK, rule=rule).calls == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLStability(history=0), "history: expected at least 1, got 0"),
        (lambda: KLStability(kl_threshold="x"), "kl_threshold: expected a number, got 'x'"),
        (lambda: DraftVerify(draft=None), "draft: expected a number, got None"),
        (lambda: Remasking(0), "steps: expected at least 1, got 0"),
        (lambda: Remasking(4, 1.5), r"eta: expected a number in \[0, 1\], got 1.5"),
        (lambda: Remasking(4, schedule="loop"), "schedule: expected one of cap, rescale, conf"),
        (lambda: Remasking(4, 0.1, "conf"), "eta: expected none with schedule='conf', got 0.1"),
    ],
)
def test_rules_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": 3}, "rule: expected .* Remasking or FirstHitting, got int"),
        ({"rule": FirstHitting(), "steps": 3}, "steps: expected None with FirstHitting"),
        ({"rule": Remasking(3), "sliding": True}, "sliding: expected False with Remasking"),
        ({"rule": TopK(1), "sliding": True, "steps": 3}, "steps: expected None with a sliding"),
        (
            {"rule": TopK(1), "vocab_start": 0},
            "vocab_start: expected None, as a decode needs the whole",
        ),
        ({"rule": KLStability(), "cfg_scale": 1.0}, "cfg_scale: expected 0 with KLStability"),
    ],
)
def test_combinations_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        generate(lambda tokens: None, torch.full((1, 3), 4), mask_id=4, **options)

"""What the unmasking functions refuse, and that they record no gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torch_winnow.unmasking import (
    AnswerEntropy,
    ConfidenceThreshold,
    EntropyBound,
    EntropyThreshold,
    ShadowBlock,
    TopK,
    generate,
    logit_stats,
    presets,
    select_positions,
    unmask_step_,
)

INF = float("inf")


def step(tokens=None, **options):
    tokens = torch.full((2, 4), 9) if tokens is None else tokens
    return unmask_step_(
        tokens, torch.randn(2, 4, 9), mask_id=9, rule=EntropyThreshold(0.2), **options
    )


@pytest.mark.parametrize(
    "window",
    [
        torch.tensor([0, 2]),
        torch.zeros(2, 1, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(1, 2, dtype=torch.int64),
        torch.zeros(2, 2),
        torch.zeros(2, 2, dtype=torch.int32),
        [[0, 2], [0, 2]],
    ],
)
def test_window_is_checked(window):
    with pytest.raises(ValueError, match=r"window: expected .*got"):
        step(window=window)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 3, dtype=torch.bool),
        torch.ones(1, 4, dtype=torch.bool),
        torch.ones(2, 4),
    ],
)
def test_mask_is_checked(mask):
    with pytest.raises(ValueError, match=r"mask: expected \(2, 4\) bool"):
        step(mask=mask)


@pytest.mark.parametrize(
    "ids", [torch.tensor([1], dtype=torch.int32), torch.tensor([[1]]), [1.7], 3]
)
def test_suppressed_ids_are_checked(ids):
    with pytest.raises(ValueError, match="suppress_ids: expected"):
        step(suppress_ids=ids)
    with pytest.raises(ValueError, match="suppress_ids: expected"):
        logit_stats(torch.randn(2, 9), suppress_ids=ids)


def test_guidance_needs_its_logits():
    with pytest.raises(ValueError, match="cfg_scale: expected 0 without unconditional_logits"):
        logit_stats(torch.randn(2, 5), cfg_scale=2.0)
    with pytest.raises(ValueError, match=r"model: expected logits \(2B, L, V\) for"):
        generate(
            lambda tokens: torch.randn(1, 3, 5),
            torch.full((1, 3), 5),
            mask_id=5,
            rule=TopK(1),
            cfg_scale=2.0,
        )
    with pytest.raises(ValueError, match=r"unconditional_logits: expected \(1, 3\)"):
        logit_stats(torch.randn(1, 3), unconditional_logits=torch.randn(7))


def test_nothing_keeps_a_graph_alive():
    weight = torch.randn(5, 5, requires_grad=True)
    result = generate(
        lambda tokens: torch.ones(1, 3, 5) @ weight, torch.full((1, 3), 5), mask_id=5, rule=TopK(1)
    )
    assert not result.entropies.requires_grad
    stats = logit_stats(torch.ones(3, 5) @ weight)
    assert not any(value.requires_grad for value in stats if value is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_certain_row_has_no_entropy_at_all(dtype, cpu_capability):
    assert logit_stats(torch.zeros(1, 1, dtype=dtype)).entropy.item() == 0.0
    assert logit_stats(torch.tensor([[0.0, -INF, -INF]], dtype=dtype)).entropy.item() == 0.0
    logits = torch.full((1, 8, 40), -INF, dtype=dtype)
    logits[..., 3] = 0.0
    result = generate(
        lambda tokens: logits, torch.full((1, 8), 39), mask_id=39, rule=EntropyBound(0.0)
    )
    assert result.calls == 1


@pytest.mark.parametrize("make", [lambda: TopK(2.5), lambda: TopK([1.7, 2])])
def test_counts_are_integers(make):
    with pytest.raises(ValueError, match="num_tokens: expected an int or one int per step"):
        make()


def test_thresholds_are_numbers():
    with pytest.raises(ValueError, match="threshold: expected a number.*got 'x'"):
        EntropyThreshold("x")


def test_generate_says_what_it_got():
    tokens = torch.full((1, 3), 5)
    with pytest.raises(ValueError, match="model: expected logits.*got None"):
        generate(lambda _: None, tokens, mask_id=5, rule=TopK(1))
    with pytest.raises(ValueError, match="stop: expected None or AnswerEntropy, got 3"):
        generate(lambda _: torch.zeros(1, 3, 5), tokens, mask_id=5, rule=TopK(1), stop=3)


def test_a_model_that_writes_to_its_input_changes_nothing():
    def model(tokens):
        tokens.zero_()
        return torch.eye(5)[None, 1:4] * 9

    result = generate(model, torch.full((1, 3), 5), mask_id=5, rule=TopK(1))
    assert result.tokens.tolist() == [[1, 2, 3]]
    assert result.calls == 3


def test_a_schedule_has_no_steps_before_its_first():
    for run in (
        lambda: step(step=-1),
        lambda: select_positions(torch.rand(1, 2), torch.ones(1, 2) > 0, TopK((2, 1)), step=-1),
    ):
        with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
            run()


@pytest.mark.parametrize("mask_id", [31.5, "9", True, None])
def test_mask_id_is_an_integer(mask_id):
    tokens = torch.full((1, 3), 9)
    with pytest.raises(ValueError, match="mask_id: expected an integer, got"):
        unmask_step_(tokens, torch.zeros(1, 3, 9), mask_id=mask_id, rule=TopK(1))
    with pytest.raises(ValueError, match="mask_id: expected an integer, got"):
        generate(lambda _: torch.zeros(1, 3, 9), tokens, mask_id=mask_id, rule=TopK(1))


@pytest.mark.parametrize("gamma", [-0.1, float("nan"), "x", True, None])
def test_gamma_is_checked(gamma):
    with pytest.raises(ValueError, match="gamma: expected a number >= 0, got"):
        AnswerEntropy(torch.ones(3, dtype=torch.bool), gamma)
    with pytest.raises(ValueError, match=r"positions: expected a bool tensor, got \[1"):
        AnswerEntropy([1, 0], 0.1)


@pytest.mark.parametrize("limit", [2.5, 0, True, "2"])
def test_max_tokens_is_a_count(limit):
    with pytest.raises(ValueError, match="max_tokens: expected None or at least 1, got"):
        EntropyThreshold(0.2, limit)


@pytest.mark.parametrize("make", [lambda: ConfidenceThreshold(True), lambda: TopK(True)])
def test_bools_are_no_numbers(make):
    with pytest.raises(ValueError, match="expected .* got True"):
        make()
    with pytest.raises(ValueError, match="seed: expected an integer, got True"):
        step(seed=True)


def test_numbers_of_numpy_are_numbers():
    logits = torch.randn(2, 4, 9)
    options = {"mask_id": np.int64(9), "seed": np.int64(3), "suppress_ids": [np.int32(2)]}
    ours = unmask_step_(
        torch.full((2, 4), 9), logits, rule=TopK(np.int64(2)), step=np.int64(0), **options
    )
    plain = unmask_step_(
        torch.full((2, 4), 9), logits, rule=TopK(2), mask_id=9, seed=3, suppress_ids=[2]
    )
    assert torch.equal(ours.stats.token, plain.stats.token)
    assert torch.equal(ours.transfer, plain.transfer)
    assert EntropyThreshold(np.float32(0.5), np.int64(2)) == EntropyThreshold(0.5, 2)


@pytest.mark.parametrize("length", [2**62, 2**63 - 1])
def test_a_block_or_schedule_longer_than_the_row_is_all_of_it(length):
    tokens = torch.tensor([[0, 5, 5, 5]])
    for options in ({"block_length": length}, {"steps": length}):
        result = generate(
            lambda t: torch.zeros(1, 4, 5), tokens, mask_id=5, rule=TopK(1), **options
        )
        assert result.step_map.tolist() == [[-1, 0, 1, 2]]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: generate_with(block_length=2**63), "block_length: expected None or at least 1"),
        (lambda: generate_with(mask_id=2**70), "mask_id: expected a 64-bit signed integer, got 1"),
        (lambda: TopK(2**70), "num_tokens: expected an int or one int per step"),
        (lambda: logit_stats(torch.zeros(1, 3), seed=2**63), "seed: expected a 64-bit signed"),
        (lambda: logit_stats(torch.zeros(1, 3), generator=5), "generator: expected a torch.Gen"),
        (lambda: select(score=[[1.0]]), r"score: expected a tensor, got \[\[1.0\]\]"),
        (lambda: select(mask=[[True]]), r"mask: expected a tensor, got \[\[True\]\]"),
        (lambda: shadowed(None), r"model: expected logits \(B, L, V\) or an object"),
        (lambda: shadowed(torch.zeros(1, 3, 5)), r"model: expected logits \(B, L \+ D, V\) with"),
        (lambda: select(window=[[0, 1]]), r"window: expected a tensor or None, got \[\[0, 1\]\]"),
    ],
)
def test_errors_name_the_argument(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def generate_with(mask_id=5, **options):
    tokens = torch.full((1, 3), 5)
    generate(lambda t: torch.zeros(1, 3, 5), tokens, mask_id=mask_id, rule=TopK(1), **options)


def shadowed(logits):
    tokens = torch.full((1, 3), 5)
    model = ShadowBlock(lambda tokens, **_: logits)
    generate(model, tokens, mask_id=5, **presets.wino(block_length=2))


def select(score=None, mask=None, window=None):
    score = torch.zeros(1, 1) if score is None else score
    mask = torch.ones(1, 1, dtype=torch.bool) if mask is None else mask
    select_positions(score, mask, EntropyThreshold(0.2), window=window)


def test_a_model_is_a_function():
    """The logits in its place, say."""
    with pytest.raises(ValueError, match="model: expected a function of tokens, got Tensor"):
        generate(torch.zeros(1, 4, 9), torch.full((1, 4), 9), mask_id=9, rule=TopK(1))

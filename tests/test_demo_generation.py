"""The demo's generation section, on models and text so small that only its structure shows."""

from __future__ import annotations

import pytest
import torch

from torch_winnow.demo import generation, train
from torch_winnow.demo.text import Text
from torch_winnow.models import (
    CATConfig,
    CompressAttendTransformer,
    DenseConfig,
    DenseDecoder,
    MaskedDiffusion,
    MaskedDiffusionConfig,
    StackConfig,
)

TINY = StackConfig(width=16, depth=1, heads=2)


@pytest.fixture
def context(monkeypatch):
    small = {"_BATCH": 2, "_PROMPT": 192, "_ROUNDS": 2, "_ROUND_TOKENS": 16, "WINDOWS": 3}
    for name, value in {**small, "WINDOW": 40}.items():
        monkeypatch.setattr(generation, name, value)
    content = torch.randint(256, (1000,), dtype=torch.uint8)
    models = train.Models(
        CompressAttendTransformer(CATConfig(TINY, TINY, (4, 16))),
        DenseDecoder(DenseConfig(TINY)),
        MaskedDiffusion(MaskedDiffusionConfig(TINY)),
    )
    return train.Context(Text(content, content, "a fingerprint"), models)


def test_every_setting_is_measured(context):
    contenders = generation.contenders_of(context.models)
    outcomes = generation.measure(contenders, context.text)
    assert list(outcomes) == ["dense", "CAT, chunks of 4", "CAT, chunks of 16"]
    assert all(outcome.tokens_per_second > 0 for outcome in outcomes.values())
    # Untrained models guess: 8 bits per byte, near enough.
    assert all(7 < outcome.bits_per_byte.mean() < 9 for outcome in outcomes.values())
    caches = [outcome.cache_bytes for outcome in outcomes.values()]
    assert caches[0] > caches[1] > 0
    assert caches[1] >= caches[2]


def test_the_section_says_and_draws_what_was_measured(context):
    axis = pytest.importorskip("matplotlib.figure").Figure().subplots()
    section = generation.run(context)
    assert [row.setting for row in section.rows][0] == "dense"
    assert "×" not in section.rows[0].speed
    assert all("×" in row.speed and "±" in row.quality for row in section.rows[1:])
    section.draw(axis)
    assert len(axis.patches) == 3


def test_windows_cover_the_text(context):
    windows = context.text.held_out_windows(5, 100)
    assert windows.shape == (5, 100)
    assert torch.equal(windows[0], context.text.held_out[:100].long())
    assert torch.equal(windows[-1], context.text.held_out[-100:].long())

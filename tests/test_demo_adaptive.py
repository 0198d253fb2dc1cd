"""The adaptive demo: that its task asks what it says, and that what is measured is drawn."""

from __future__ import annotations

import pytest
import torch

from torch_winnow.demo import adaptive, generation
from torch_winnow.demo.text import Text
from torch_winnow.models import CATConfig, CompressAttendTransformer, StackConfig

SMALL = adaptive.RecallTask(context=64, pairs=8, keys=10, values=5, noise=3)
TINY = StackConfig(width=16, depth=1, heads=2)


def test_every_answer_is_in_the_context_once():
    texts = SMALL.texts(50, torch.Generator().manual_seed(0))
    assert texts.shape == (50, SMALL.length) == (50, 80)
    assert int(texts.max()) < SMALL.vocab_size
    answers = SMALL.answers(texts)
    assert answers.shape == (50, 8)
    for text, values in zip(texts.tolist(), answers.tolist(), strict=True):
        asked = text[64::2]
        assert len(set(asked)) == 8
        for key, value in zip(asked, values, strict=True):
            assert text[:64].count(key) == 1
            place = text.index(key)
            assert place % 2 == 0
            assert text[place + 1] == value
            assert 10 <= value < 15
        noise = [token for token in text[:64] if token >= 15]
        assert len(noise) == 48


@pytest.fixture
def small(monkeypatch):
    sizes = {
        "_BATCH": 2,
        "_PROMPT": 64,
        "_ROUNDS": 2,
        "_ROUND_TOKENS": 16,
        "WINDOWS": 3,
        "WINDOW": 70,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(generation, name, value)
    monkeypatch.setattr(adaptive, "_TRIALS", 6)
    monkeypatch.setattr(adaptive, "_STEP_BYTES", 512)
    content = torch.randint(256, (1000,), dtype=torch.uint8)
    cat = CompressAttendTransformer(CATConfig(TINY, TINY, (4, 8, 16, 32), max_tokens=256)).eval()
    return cat, Text(content, content, "a fingerprint")


def test_what_is_measured_is_drawn(small, tmp_path):
    pytest.importorskip("matplotlib")
    before = torch.random.get_rng_state()
    memory = adaptive.train_recall(SMALL, steps=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    shares = adaptive.recall(memory, SMALL)
    assert {size: share.shape for size, share in shares.items()} == dict.fromkeys(
        (4, 8, 16, 32), (6,)
    )
    cat, text = small
    assert adaptive.train_text(text, steps=2).config.chunk_sizes == cat.config.chunk_sizes
    measured = adaptive.measure(cat, memory, text, SMALL)
    assert list(measured.bits) == [4, 8, 16, 32]
    # Untrained models guess: 8 bits per byte, near enough.
    assert all(7 < bits < 9.5 for bits in (*measured.bits.values(), *measured.vector_bits.values()))
    lines = adaptive.table(measured).splitlines()
    assert len(lines) == 6
    assert "±" in lines[2]
    adaptive.draw(measured, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_bits_from_vectors_are_those_of_the_first_bytes(small):
    cat, text = small
    window = text.held_out_windows(1, 70)
    with torch.no_grad():
        logits = cat(window, chunk_size=8).log_softmax(-1)
    expected = -sum(logits[0, place, window[0, place]].item() for place in (32, 64)) / 2
    found = adaptive.bits_from_vectors(cat, window)[8]
    assert found == pytest.approx(expected / torch.log(torch.tensor(2.0)).item(), rel=1e-4)

"""The whole demo, from text to table and figure, so small that it takes seconds."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path

import pytest
import torch

from torch_winnow.demo import __main__ as demo
from torch_winnow.demo import block_sparse, generation, infilling, steering, train
from torch_winnow.demo.text import Text
from torch_winnow.models import StackConfig

TINY = StackConfig(width=16, depth=1, heads=2)
SIZES = {
    generation: {"_BATCH": 2, "_PROMPT": 64, "_ROUNDS": 2, "_ROUND_TOKENS": 32, "WINDOWS": 3},
    infilling: {"_WINDOWS": 3, "_LENGTH": 24},
    steering: {"_PROMPTS": 2, "_PARTICLES": 3, "_NEW_BYTES": 16, "_SEEDS": (0, 1)},
    block_sparse: {"_ROWS": 2, "_CONTEXT": 200, "_SCORED": 8},
    train: {"_DECODER": TINY, "_COMPRESSOR": TINY},
}


@pytest.fixture
def small(monkeypatch):
    for module, sizes in SIZES.items():
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(generation, "WINDOW", 40)
    monkeypatch.setattr(train, "STEP_BYTES", 2048)
    recipes = [dataclasses.replace(job.recipe, steps=2) for job in train.JOBS]
    jobs = zip(train.JOBS, recipes, strict=True)
    monkeypatch.setattr(
        train, "JOBS", tuple(dataclasses.replace(job, recipe=recipe) for job, recipe in jobs)
    )
    source = torch.tensor(list(Path(inspect.__file__).read_bytes()), dtype=torch.uint8)
    text = Text(source, source, "a fingerprint")
    monkeypatch.setattr(train.text_module, "load", lambda: text)
    return text


def test_from_text_to_figure(small, monkeypatch, tmp_path, capsys):
    for package in ("matplotlib", "tabulate"):
        pytest.importorskip(package)
    monkeypatch.setattr(sys, "argv", ["demo", "--folder", str(tmp_path)])
    demo.main()
    said = capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert table in said
    for section in ("generation", "unmasking", "steering", "block-sparse"):
        assert f"| {section} " in table
    rows = [line.split("|")[2].strip() for line in table.splitlines()]
    for setting in ("dense", "one position per call", "best of N, 3 per prompt", "all blocks"):
        assert setting in rows
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(train, "_train", lambda *job: pytest.fail("trained a second time"))
    models = train.prepare(tmp_path).models
    assert not models.dense.training


def test_windows_grow_but_not_the_bytes_of_a_step(small):
    generator = torch.Generator().manual_seed(0)
    lengths = []
    for progress in (0.0, 0.5, 0.9):
        windows = train.growing_windows(small, train.STEP_BYTES, progress, generator)
        assert windows.numel() == train.STEP_BYTES
        lengths.append(windows.shape[1])
    assert lengths == sorted(set(lengths))


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["demo", "--folder", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "tabulate", None)
    with pytest.raises(SystemExit, match=r"needs tabulate: pip install 'torch-winnow\[demo\]'"):
        demo.main()
    assert not list(tmp_path.iterdir())

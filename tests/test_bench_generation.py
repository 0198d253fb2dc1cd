"""The generation benchmark at a size where only its structure shows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "bench" / "generation.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source checkout")


@pytest.fixture(scope="module")
def generation():
    spec = importlib.util.spec_from_file_location("bench_generation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_generation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_contender_is_measured(generation, tmp_path, capsys):
    shape = ["--tokens", "70", "--width", "128", "--depth", "1", "--batches", "2"]
    generation.main([*shape, "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    results = {entry["name"]: entry for entry in json.loads(path.read_text())["results"]}
    names = list(results)
    assert names[-4:] == [f"CAT, chunks of {size}" for size in (4, 8, 16, 32)]
    assert len(names) == 8
    assert all(entry["seconds"] > 0 for entry in results.values())
    # 70 rows and the start row take two pages of 64; 70 / 32 vectors and a chunk one.
    page = 64 * 2 * 128 * 4  # rows, keys and values, width, bytes of a float
    assert results[names[0]]["cache_bytes"] == 2 * 2 * page
    assert results[names[-1]]["cache_bytes"] == 2 * page
    equal = next(name for name in names if "equal parameters" in name)
    assert abs(results[equal]["parameters"] / results[names[-1]]["parameters"] - 1) < 0.4
    assert path.with_suffix(".md").read_text().count("\n|") == 10
    assert "written:" in capsys.readouterr().out


def test_a_preallocated_cache_says_what_the_forward_says(generation):
    entrants = generation.contenders(128, 1, 64, dtype=torch.float32, device="cpu")
    for contender in entrants:
        generation.check(contender, torch.device("cpu"), 1e-4)

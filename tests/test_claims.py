"""What the README and the benchmark pages say is what the committed JSON holds."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="needs the source checkout")


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("tabulate")
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module("report")
    sys.path.pop(0)


RUNS = [p for p in sorted(RESULTS.glob("*.json")) if "benchmarks" in json.loads(p.read_text())]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_tables_are_made_from_the_json(report, path):
    assert path.with_suffix(".md").read_text() == report.text(json.loads(path.read_text()))


def test_losses_are_shown(report):
    rows = [("op 1", "rival", 0.5), ("op 2", "rival", 3.0), ("op 3", "rival", 0.25)]
    assert [row[0] for row in report.losses(rows)] == ["op 3", "op 1"]
    assert "in 1 of 3 shapes" in report.summary(rows)
    assert "op 3" in report.losses_table(rows)
    assert "op 2" not in report.losses_table(rows)

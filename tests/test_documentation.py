"""The pages of docs/ that teach do it by examples, and each of these prints what the page says."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("attention", "kvcache", "recipes", "resampling", "unmasking")
PAGES = [
    ROOT / "docs" / "start.md",
    ROOT / "docs" / "errors.md",
    *(page for folder in FOLDERS for page in sorted(ROOT.glob(f"docs/{folder}/*.md"))),
]
PAGES.remove(ROOT / "docs" / "recipes" / "index.md")  # a table


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_page(page: Path):
    results = doctest.testfile(
        str(page), module_relative=False, optionflags=doctest.ELLIPSIS, encoding="utf-8"
    )
    assert results.attempted > 0
    assert results.failed == 0

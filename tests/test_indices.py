"""Indices that point outside: refused on the CPU, as the table of docs/numerics.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fuzz.indices import INDICES, NAMES, pointing_outside

PAGE = Path(__file__).parents[1] / "docs" / "numerics.md"


def promised() -> dict[tuple[str, str], str]:
    """What the page says about each argument on the CPU."""
    text = PAGE.read_text().split("## Indices that point outside")[1]
    rows = re.findall(r"^\| (`.+?) \| (`.+?) \| (.+?) \| .+? \|$", text, re.MULTILINE)
    return {
        (name, argument): promise
        for names, arguments, promise in rows
        for name in re.findall(r"`(\w+)`", names)
        for argument in re.findall(r"`(\w+)`", arguments)
        if name in INDICES
    }


def test_the_page_names_every_index():
    assert promised().keys() == set(NAMES)


@pytest.mark.parametrize(("name", "argument"), NAMES)
def test_the_cpu_refuses_what_it_would_follow(name: str, argument: str):
    """Every kind of value is refused somewhere; what is not refused is not followed."""
    refusals = []
    for arguments in pointing_outside(name, argument):
        try:
            getattr(torch.ops.winnow, name)(**arguments)
        except ValueError as error:
            refusals.append(str(error))
    # A position may be refused because the table has no block for it.
    assert {text.split(": expected")[0] for text in refusals} <= set(INDICES[name])
    assert bool(refusals) == (promised()[name, argument] == "refused")

"""The site: `make docs` builds it with warnings as errors, into docs/_build."""

from __future__ import annotations

from pathlib import Path

import torch_winnow

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "bench" / "results"

project = "torch-winnow"
author = copyright = "The torch-winnow developers"
release = torch_winnow.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"torch-winnow {release}"


BENCHMARKS = """\
# Benchmarks

Every committed run of `make bench` and `make bench-generation` as it is: medians, rivals
alternating with ours in one process, shapes where a rival wins included. "vs ours" is a rival's
median over ours, so above 1× ours is faster; "of limit" is the time that the machine's read
bandwidth or multiply-add rate, measured in the same run, would need at least.
"""


def benchmarks() -> str:
    text = [BENCHMARKS]
    for path in sorted(RESULTS.glob("*.md"), reverse=True):
        text += [f"## {path.stem}", path.read_text()]
        picture = path.with_suffix(".png")
        if picture.exists():
            text.append(f"![Strongest rival over ours](../bench/results/{picture.name})")
    return "\n\n".join(text)


(DOCS / "benchmarks.md").write_text(benchmarks())  # ignored by git: the results are kept

"""What a section of the demo hands back, and how all of them become one table and one figure."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADERS = ("part", "setting", "speed", "cost", "quality")


@dataclass(frozen=True)
class Row:
    """One line of the table: a setting, and what was measured of it, with units in the text."""

    setting: str
    speed: str
    cost: str
    quality: str


@dataclass(frozen=True)
class Section:
    """One part of the demo.

    Attributes:
        title: a word or two, the first column of the table.
        meaning: what was done and what each number means, for somebody who has read no paper.
        rows: the measurements.
        draw: draws this part's panel of the figure.
    """

    title: str
    meaning: str
    rows: Sequence[Row]
    draw: Callable[[Axes], None]


def table(sections: Sequence[Section]) -> str:
    """All rows as one Markdown table; a section is named on its first row."""
    from tabulate import tabulate

    lines = [
        (section.title if first else "", row.setting, row.speed, row.cost, row.quality)
        for section in sections
        for first, row in zip([True] + [False] * len(section.rows), section.rows, strict=False)
    ]
    return tabulate(lines, headers=_HEADERS, tablefmt="github", disable_numparse=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Runs ``write`` on a temporary neighbour and renames it: ``path`` is whole or untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def figure(sections: Sequence[Section], path: Path) -> None:
    """One panel a section, two in a row, saved as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = (len(sections) + 1) // 2
    canvas, axes = pyplot.subplots(
        rows, 2, figsize=(12, 4.5 * rows), squeeze=False, layout="constrained"
    )
    for axis, section in zip(axes.flat, sections, strict=False):
        section.draw(axis)
    for axis in axes.flat[len(sections) :]:
        axis.set_visible(False)
    write_whole(path, lambda target: canvas.savefig(target, dpi=120, format="png"))
    pyplot.close(canvas)

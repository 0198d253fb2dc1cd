"""The demo's table and figure, and that an interrupted write leaves nothing half-written."""

from __future__ import annotations

import pytest

from torch_winnow.demo.report import Row, Section, figure, table, write_whole


def section(title: str) -> Section:
    rows = [Row("one", "1 s", "2 calls", "50%"), Row("two", "3 s", "1 call", "49%")]
    return Section(title, "what it means", rows, lambda axis: axis.plot([1, 2], [3, 4]))


def test_table_names_a_section_once_and_keeps_every_row():
    lines = table([section("first"), section("second")]).splitlines()
    assert len(lines) == 2 + 4
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["first", "", "second", ""]
    assert "1 call " in lines[3]


def test_figure_is_a_picture(tmp_path):
    path = tmp_path / "new" / "figure.png"
    figure([section("first"), section("second"), section("third")], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_write_whole_replaces_at_once(tmp_path):
    path = tmp_path / "table.md"
    path.write_text("old")

    def interrupted(target):
        target.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_whole(path, lambda target: target.write_text("new"))
    assert path.read_text() == "new"

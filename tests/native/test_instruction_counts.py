"""The hot loops run no more instructions than they did: a guard that no busy machine can disturb.

``hot_loops.cpp`` is linked with the build tree's AVX2 loops and run under callgrind. What each
compiler makes of them is recorded in ``instruction_counts.json``; others skip. After a change that
is worth its instructions, or saves some::

    python tests/native/test_instruction_counts.py --update
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import host_library
import pytest

import torch_winnow

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("instruction_counts.json")
HEADER = Path("/usr/include/valgrind/callgrind.h")
TOLERANCE = 1.1


def objects() -> list[Path]:
    """The AVX2 loops of the release build that was configured last."""
    caches = sorted(ROOT.glob("build/cp*/CMakeCache.txt"), key=lambda path: path.stat().st_mtime)
    released = [path for path in caches if "CMAKE_BUILD_TYPE:STRING=Release" in path.read_text()]
    if not released:
        return []
    return sorted(released[-1].parent.glob("CMakeFiles/_cpu_AVX2.dir/**/*_simd.cc.o"))


def why_not() -> str | None:
    """What is missing to count instructions here."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "counts the AVX2 loops"
    if host_library.tool("valgrind") is None or not HEADER.exists():
        return "needs valgrind"
    if host_library.tool("g++") is None:
        return "needs g++"
    if not objects():
        return "needs the objects of a release build"
    return None


def count(folder: Path) -> dict[str, int]:
    """Instructions of every loop in hot_loops.cpp."""
    binary = folder / "hot_loops"
    build = [
        "g++",
        "-std=c++20",
        "-O1",
        "-Wno-psabi",
        f"-I{ROOT / 'csrc'}",
        f"-I{HEADER.parents[1]}",
    ]
    build += [str(Path(__file__).with_name("hot_loops.cpp")), *map(str, objects())]
    for command in (
        [*build, "-o", str(binary)],
        ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder / 'profile'}", str(binary)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    counts = {}
    for number in range(1, len(list(folder.glob("profile.*"))) + 1):
        text = (folder / f"profile.{number}").read_text()
        name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        assert name
        assert total
        counts[name[1]] = int(total[1])
    return counts


def slower(now: dict[str, int], then: dict[str, int]) -> list[str]:
    """What runs more instructions than it did, in words."""
    return [
        f"{name}: {now[name]} instructions, {now[name] / then[name] - 1:+.0%}"
        for name in now
        if now[name] > TOLERANCE * then[name]
    ]


@pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
def test_no_loop_runs_more_instructions_than_recorded(tmp_path: Path):
    record = json.loads(RECORD.read_text())
    compiler = torch_winnow.build_info().compiler
    if compiler not in record:
        pytest.skip(f"counts are recorded for {', '.join(record)}, not for {compiler}")
    now, then = count(tmp_path), record[compiler]
    assert now.keys() == then.keys(), "see --update in this file"
    assert not slower(now, then), "see --update in this file"


def test_more_instructions_are_found():
    assert slower({"a": 110, "b": 99}, {"a": 100, "b": 100}) == []
    assert slower({"a": 121, "b": 99}, {"a": 100, "b": 100}) == ["a: 121 instructions, +21%"]


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"] or why_not():
        sys.exit(why_not() or __doc__)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        record[torch_winnow.build_info().compiler] = count(Path(folder))
    RECORD.write_text(json.dumps(record, indent=2) + "\n")

"""What a build from source says when something that it needs is missing or too old."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")

pytestmark = pytest.mark.skipif(
    CMAKE is None or not (ROOT / "CMakeLists.txt").exists(), reason="configures with cmake"
)


def configure(tmp_path: Path, *options: str, **environment: str) -> str:
    """The text of a failing configuration, line breaks folded as CMake wraps them."""
    command = [CMAKE, "-S", str(ROOT), "-B", str(tmp_path / "build"), *options]
    command += [f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode
    return " ".join(result.stderr.split())


def fake_torch(tmp_path: Path, version: str) -> Path:
    root = tmp_path / "torch"
    (root / "include").mkdir(parents=True)
    (root / "version.py").write_text(f"__version__ = '{version}'\n")
    return root


def test_no_compiler(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "uname", "ninja", "make"):
        if path := shutil.which(tool):
            (tools / tool).symlink_to(path)
    text = configure(tmp_path, PATH=str(tools), CXX="")
    assert "no C++ compiler was found" in text
    assert "apt-get install g++" in text


def test_no_torch(tmp_path):
    text = configure(tmp_path, f"-DTORCH_ROOT={tmp_path / 'absent'}")
    assert "torch is not importable" in text
    assert "--no-build-isolation" in text


def test_old_torch(tmp_path):
    text = configure(tmp_path, f"-DTORCH_ROOT={fake_torch(tmp_path, '2.10.0+cpu')}")
    assert "torch 2.10.0+cpu" in text
    assert "too old; 2.11 or newer is needed" in text

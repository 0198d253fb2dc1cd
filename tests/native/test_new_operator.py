"""docs/new_operator.md, followed: its blocks compile, and its tests pass.

The new operator is built into a library of its own, for one instruction set, and its Python is put
beside the installed package's, in a process of its own. The CUDA source is compiled for the host.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import host_library
import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "new_operator.md"
COMPILER = os.environ.get("CXX") or host_library.tool("c++") or host_library.tool("g++")
BLOCK = re.compile(r"```\{code-block\} \w+\n:caption: (\S+)\n\n(.*?)```", re.DOTALL)

PLUGIN = """
import importlib, sys
from pathlib import Path
import torch
folder = Path(__file__).parent
import torch_winnow.reference
torch.ops.load_library(str(folder / "new_operator.so"))
def extend(module, path, *shown_in):
    room = importlib.import_module(module)
    exec(compile((folder / path).read_text(), path, "exec"), vars(room))
    for name in shown_in:
        vars(importlib.import_module(name))["largest_weight"] = room.largest_weight
python = "python/torch_winnow/"
definitions, wrappers = "reference/resampling_weights", "_resampling/weights"
extend("torch_winnow.reference.resampling_weights", f"{python}{definitions}.py", "torch_winnow.reference")
extend("torch_winnow._resampling.weights", f"{python}{wrappers}.py", "torch_winnow.resampling")
"""  # noqa: E501


def write_blocks(folder: Path) -> list[str]:
    """What the page adds, each block as a file of its own."""
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    for name, text in blocks:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return [name for name, _ in blocks]


def run(*command: object, **options: object) -> None:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )
    assert not done.returncode, f"{done.stdout}\n{done.stderr}"


@pytest.mark.skipif(not PAGE.exists() or COMPILER is None, reason="needs a checkout and a compiler")
def test_the_page_holds(tmp_path):
    names = write_blocks(tmp_path)
    assert sum(name.startswith("csrc/") for name in names) == 5
    schema = (tmp_path / "csrc/ops.cpp").read_text()
    (tmp_path / "csrc/ops.cpp").write_text(
        "#include <torch/csrc/stable/library.h>\n"
        f"STABLE_TORCH_LIBRARY_FRAGMENT(winnow, m) {{ {schema} }}\n"
    )
    root = Path(torch.__file__).parent
    flags = ["-std=c++17", "-fPIC", "-O1", "-w", "-ffp-contract=off", "-fno-strict-aliasing"]
    flags += [f"-I{tmp_path / 'csrc'}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/native/emulator'}"]
    flags += [f"-isystem{root}/include", f"-isystem{root}/include/torch/csrc/api/include"]
    flags += ["-DWINNOW_ONLY_CAPABILITY=DEFAULT"]
    stable = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    stem = tmp_path / "csrc/resampling/largest_weight"
    run(COMPILER, *flags, *stable, "-fsyntax-only", "-xc++", f"{stem}.cu")
    simd = ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT", "-c", f"{stem}_simd.cc"]
    run(COMPILER, *flags, *simd, "-o", tmp_path / "simd.o")
    sources = [tmp_path / "csrc/ops.cpp", f"{stem}.cpp", tmp_path / "simd.o"]
    library = ["-shared", "-o", tmp_path / "new_operator.so"]
    run(COMPILER, *flags, *stable, *sources, *library, f"-L{root}/lib", "-ltorch_cpu")

    (tmp_path / "new_operator_plugin.py").write_text(PLUGIN)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests"), str(ROOT / "tests/native")])
    tests = tmp_path / "tests/test_resampling_largest_weight.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "new_operator_plugin"]
    command += ["-k", "not cuda and not avx", "--rootdir", tmp_path, tests]
    run(*command, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path)
    code = (
        "import doctest, new_operator_plugin, torch_winnow._resampling.weights as room\n"
        "finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()\n"
        "for test in finder.find(room.largest_weight, 'example', module=False): runner.run(test)\n"
        "assert runner.summarize() == (0, 3), runner.summarize()\n"
    )
    run(sys.executable, "-c", code, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path)

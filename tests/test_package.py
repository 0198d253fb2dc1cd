"""What a user meets first: import, build information, the environment variable, the docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import abi_gate
import torch_winnow
from torch_winnow import __main__ as self_check
from torch_winnow import _library

FAMILIES = ("attention", "kvcache", "resampling", "unmasking")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_build_info_tells_what_runs():
    info = torch_winnow.build_info()
    assert info.version == torch_winnow.__version__
    assert info.torch_running == torch.__version__
    assert info.cpu_capability in info.capabilities
    assert info.cuda_library is not bool(info.cuda_reason)
    text = str(info)
    assert info.cpu_capability in text
    assert f"CUDA library: {'' if info.cuda_library else 'not '}loaded" in text


def test_environment_forces_an_instruction_set():
    result = python(
        "import torch_winnow; print(torch_winnow.build_info().cpu_capability)",
        WINNOW_CPU_CAPABILITY="default",
    )
    assert result.stdout.strip() == "default", result.stderr


def test_an_unknown_instruction_set_is_refused():
    result = python("import torch_winnow", WINNOW_CPU_CAPABILITY="avx1024")
    assert result.returncode
    assert "WINNOW_CPU_CAPABILITY: expected one of default" in result.stderr
    assert "'avx1024'" in result.stderr
    with pytest.raises(ValueError, match="name: expected one of default"):
        _library.set_cpu_capability("avx1024")


def test_an_old_torch_is_refused():
    result = python("import torch; torch.__version__ = '2.10.1+cpu'; import torch_winnow")
    assert result.returncode
    assert "needs torch 2.11 or newer, found torch 2.10.1+cpu" in result.stderr
    assert "pip install" in result.stderr


@pytest.mark.skipif(not shutil.which("nm"), reason="reads the libraries with nm")
@pytest.mark.parametrize("name", ["_cpu", "_core"])
def test_libraries_need_only_the_stable_abi(name):
    found = abi_gate.undefined(Path(_library._path_of(name)))
    assert found["system"]
    assert not found["foreign"]


OBJECTS = sorted(Path(__file__).parents[1].glob("build/*/CMakeFiles/_cpu_*.dir/**/*_simd.cc.o"))


@pytest.mark.skipif(not OBJECTS or not shutil.which("nm"), reason="reads the object files with nm")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: f"{path.parents[2].name}-{path.stem}")
def test_no_variant_leaks_into_another(path):
    """A function with external linkage that a *_simd.cc compiled outside its instruction set's
    namespace could be merged by the linker and run on a machine that lacks the instructions."""
    symbols = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True)
    capability = path.parents[2].name.removeprefix("_cpu_").removesuffix(".dir")
    leaks = [
        line
        for line in symbols.stdout.splitlines()
        if line.split(maxsplit=2)[1] in "TWVu" and f"{capability}::" not in line
    ]
    assert not leaks


MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(torch_winnow.__path__, "torch_winnow.")
    if not name.endswith(("._cpu", "._core", "._cuda", "__main__"))
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_public_name_teaches(family):
    """Public docstrings say what comes in, what goes out, and show it."""
    module = importlib.import_module(f"torch_winnow.{family}")
    assert module.__all__
    for name in module.__all__:
        thing = getattr(module, name)
        assert inspect.getdoc(thing), name
        if inspect.isfunction(thing):
            assert ">>>" in inspect.getdoc(thing), f"{family}.{name} has no example"
            returns = inspect.signature(thing).return_annotation != "None"
            assert not returns or "Returns:" in inspect.getdoc(thing), f"{family}.{name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_mirrors_the_signatures(family):
    """Every operator has a definition of the same name and parameters."""
    module = importlib.import_module(f"torch_winnow.{family}")
    definitions = importlib.import_module(f"torch_winnow.reference.{family}")
    mirrored = [name for name in module.__all__ if hasattr(definitions, name)]
    assert mirrored
    for name in mirrored:
        ours = inspect.signature(getattr(module, name)).parameters
        theirs = inspect.signature(getattr(definitions, name)).parameters
        assert list(ours) == list(theirs), name


def test_the_self_check_passes_and_can_fail(capsys, monkeypatch):
    assert self_check.main() == 0
    assert "resampling" in capsys.readouterr().out
    one = (torch.tensor(1.0),)
    wrong = (one, torch.clone, torch.zeros_like)
    monkeypatch.setitem(self_check.CHECKS, "resampling", lambda draw: wrong)
    assert self_check.main() == 1
    out = capsys.readouterr().out
    assert "resampling WRONG" in out
    assert "attention, unmasking, kvcache right" in out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_of_another_device_asks_the_definitions_on_the_cpu(family, monkeypatch):
    """They make masks and indices there: on a GPU a right operator would be called wrong."""
    inputs, _, definition = self_check.CHECKS[family](torch.Generator().manual_seed(0))
    moved = []

    def operator(*arguments: torch.Tensor) -> torch.Tensor:
        moved.extend(argument.device.type for argument in arguments)
        return definition(*inputs)

    def check(draw: torch.Generator) -> self_check.Check:
        return inputs, operator, definition

    assert self_check._outcome(check, torch.device("meta")) == ""
    assert set(moved) == {"meta"}


def test_importing_costs_little_beyond_torch():
    """Counted in modules, which a busy machine does not change: nothing heavy comes along."""
    result = python(
        "import sys, torch; before = set(sys.modules); import torch_winnow;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    assert set(result.stdout.split()) <= {"torch_winnow", "torch", "ctypes", "_ctypes", "numpy"}


def test_the_definitions_are_imported_on_demand():
    result = python(
        "import sys, torch_winnow as w; before = 'torch_winnow.reference' in sys.modules;"
        "print(before, w.reference.resample.__module__); w.nothing"
    )
    assert result.stdout.split() == ["False", "torch_winnow.reference.resampling"]
    assert "module 'torch_winnow' has no attribute 'nothing'" in result.stderr

"""What a user meets first: import, build information, the environment variable, the docstrings."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import abi_gate
import torch_winnow
import typed_user
from torch_winnow import __main__ as self_check
from torch_winnow import _library

ROOT = Path(__file__).parents[1]
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
    # WINNOW_ONLY_CAPABILITY: whatever the one is, it goes by the name default.
    assert info.cpu_capability in info.capabilities or len(info.capabilities) == 1
    assert info.cuda_library is not bool(info.cuda_reason)
    text = str(info)
    assert info.cpu_capability in text
    assert f"CUDA library: {'' if info.cuda_library else 'not '}loaded" in text


def test_there_is_one_version():
    """pyproject.toml has it; a release changes CITATION.cff and the changelog's heading with it."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    released = re.findall(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert torch_winnow.__version__ == importlib.metadata.version("torch-winnow")
    assert torch_winnow.__version__.partition("+")[0] == version  # a CUDA wheel's ends in +cu130
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert released[:1] in ([], [version])


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


def test_operators_that_do_not_load_are_told(tmp_path, monkeypatch):
    (tmp_path / "_cpu.so").write_bytes(b"for another machine")
    monkeypatch.setattr(_library, "_path_of", lambda module: str(tmp_path / "_cpu.so"))
    with pytest.raises(
        ImportError, match=r"do not load beside torch .*Reinstall the wheel for this"
    ):
        _library._load_cpu()
    monkeypatch.setattr(_library, "_path_of", lambda module: None)
    with pytest.raises(ImportError, match="are missing, or are those of another Python"):
        _library._load_cpu()


def test_why_there_are_no_cuda_operators(monkeypatch, tmp_path):
    """Each reason is told, and none is one not to import."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _library._load_cuda() == "torch without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "_path_of", lambda module: None)
    assert _library._load_cuda().startswith("built without CUDA")
    damaged = tmp_path / "_cuda.so"
    damaged.write_bytes(b"no library")
    monkeypatch.setattr(_library, "_path_of", lambda module: str(damaged))
    assert _library._load_cuda().startswith(f"{damaged}: ")


@pytest.mark.skipif(not shutil.which("nm"), reason="reads the libraries with nm")
@pytest.mark.parametrize("name", ["_cpu", "_core"])
def test_libraries_need_only_the_stable_abi(name):
    found = abi_gate.undefined(Path(_library._path_of(name)))
    assert found["system"]
    assert not found["foreign"]


OBJECTS = sorted(ROOT.glob("build/*/CMakeFiles/_cpu_*.dir/**/*_simd.cc.o"))


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


def test_the_stubs_are_those_of_the_extension(tmp_path):
    pytest.importorskip("mypy")
    # Classes of pybind11 have a metaclass of their own; what they hold is compared all the same.
    (tmp_path / "allowed").write_text(
        "torch_winnow._core.BlockPool\ntorch_winnow._core.CacheTable\n"
    )
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = skip\n")  # not torch
    command = [
        sys.executable,
        "-m",
        "mypy.stubtest",
        "torch_winnow._core",
        "--allowlist",
        "allowed",
    ]
    where = Path(torch_winnow.__file__).parents[1]
    result = subprocess.run(
        [*command, "--mypy-config-file", "mypy.ini"],
        cwd=tmp_path,
        # mypy does not follow editable installs.
        env={**os.environ} | ({} if where.name == "site-packages" else {"MYPYPATH": str(where)}),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no issues found in 1 module" in result.stdout


def test_the_types_that_users_see_are_what_comes_out():
    """tests/typed_user.py is checked by mypy --strict in `make lint`; here it runs."""
    assert (Path(torch_winnow.__file__).parent / "py.typed").exists()
    keys = torch.randn(1, 2, 9, 8)
    assert typed_user.attend(keys, keys, keys).shape == keys.shape
    assert set(typed_user.steer(torch.randn(2, 4), {"x": torch.randn(2, 4, 3)})) == {"x"}
    assert typed_user.decode(torch.randn(1, 3, 5), torch.full((1, 3), 5), 5).max() < 5
    assert typed_user.cache(torch.randn(1, 1, 6, 4)).shape == (2, 1, 1, 4)
    assert typed_user.describe().startswith(torch_winnow.__version__)
    assert typed_user.model().config.max_tokens > 0


def test_the_self_check_passes_and_can_fail(capsys, monkeypatch):
    assert self_check.main() == 0
    out = capsys.readouterr().out
    assert str(torch_winnow.build_info()) in out
    assert "Python: 3." in out
    for name in _library.available_cpu_capabilities():
        assert f"self-check, {name}: attention, resampling, unmasking, kvcache right" in out
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
    """CPU time in one process, torch's against ours, best of a few: 3 %, or some 30 ms."""
    code = (
        "import time; t = [time.process_time()]; import torch; t.append(time.process_time());"
        "import torch_winnow; t.append(time.process_time()); print((t[2] - t[1]) / (t[1] - t[0]))"
    )
    python(code, PYTHONDONTWRITEBYTECODE="")  # so that ours is compiled, as torch is
    assert any(float(python(code).stdout) < 0.045 for _ in range(5))


def test_importing_brings_nothing_heavy_along():
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

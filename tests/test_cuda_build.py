"""How the CUDA operators are built and loaded, on machines without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import host_library
import pytest
import torch

import torch_winnow
from test_build_errors import CMAKE, ROOT, configure
from test_package import python
from torch_winnow import _library

INSTALLED = _library._path_of("_cuda")
NVCC = os.environ.get("CUDACXX") or shutil.which(
    "nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin"
)

configures = pytest.mark.skipif(
    CMAKE is None or not (ROOT / "CMakeLists.txt").exists(), reason="configures with cmake"
)


@pytest.fixture(scope="module")
def cuda_library() -> Path:
    """The CUDA operators: those that are installed, or else compiled now, against any torch."""
    if not shutil.which("readelf"):
        pytest.skip("reads _cuda.so with readelf")
    if INSTALLED is not None:
        return Path(INSTALLED)
    if NVCC is None or CMAKE is None or not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("neither _cuda.so nor nvcc is here")
    folder = ROOT / "build" / f"cuda-{torch.__version__}-{sys.implementation.cache_tag}"
    ninja = host_library.tool("ninja")
    command = [CMAKE, "-S", str(ROOT), "-B", str(folder), "-DWINNOW_CUDA=ON"]
    command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    command += [f"-DPython_EXECUTABLE={sys.executable}", "-DPYTHON_MODULE_EXTENSION=.so"]
    for step in (command, [CMAKE, "--build", str(folder), "--target", "_cuda", "--parallel"]):
        done = subprocess.run(
            step, env={**os.environ, "CUDACXX": NVCC}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder / "_cuda.so"


@configures
def test_a_missing_compiler_is_explained_where_cuda_is_asked_for(tmp_path):
    text = configure(tmp_path, "-DWINNOW_CUDA=ON", CUDACXX=str(tmp_path / "nvcc"))
    assert "no working CUDA compiler was found" in text
    assert "WINNOW_CUDA=OFF" in text


@configures
def test_an_unknown_choice_is_refused(tmp_path):
    assert "expected AUTO, ON or OFF, got YES" in configure(tmp_path, "-DWINNOW_CUDA=YES")


@configures
def test_a_broken_compiler_does_not_stop_a_cpu_build(tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    command = [CMAKE, "-S", str(ROOT), "-B", str(tmp_path / "build")]
    command += [f"-DPython_EXECUTABLE={sys.executable}", "-DPYTHON_MODULE_EXTENSION=.so"]
    done = subprocess.run(["env", f"CUDACXX={broken}", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CUDA operators: not built" in done.stdout


def test_cpu_torch_never_loads_it():
    if torch.version.cuda is not None:
        pytest.skip("torch has CUDA")
    info = torch_winnow.build_info()
    assert not info.cuda_library
    assert info.cuda_reason == "torch without CUDA"
    with open("/proc/self/maps") as maps:
        assert "_cuda.so" not in maps.read()


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without libtorch_cuda")
def test_an_error_in_loading_is_reported_and_harmless():
    done = python(
        "import torch; torch.version.cuda = '13.0'; import torch_winnow as w; "
        "print(w.build_info()); print(w.resampling.effective_sample_size(torch.zeros(3)).item())"
    )
    assert done.returncode == 0, done.stderr
    expected = "libtorch_cuda" if INSTALLED else "built without CUDA"
    assert re.search(rf"CUDA library: not loaded \(.*{expected}", done.stdout)
    assert done.stdout.rstrip().endswith("3.0")


def test_the_library_links_what_every_cuda_torch_has(cuda_library):
    text = subprocess.run(["readelf", "-d", cuda_library], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", text)
    assert "libtorch_cuda.so" in needed
    assert not [name for name in needed if "cudart" in name]  # static
    assert "RPATH" not in text
    assert "RUNPATH" not in text


def test_no_host_code_calls_a_function_of_the_device(cuda_library):
    """In a template nvcc accepts such a call without a word, and makes it one of exit()."""
    command = ["readelf", "--dyn-syms", "--wide", cuda_library]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    wanted = re.findall(r"UND (\w+)", text)
    assert "aoti_torch_get_current_cuda_stream" in wanted
    assert "exit" not in wanted


def test_the_stub_is_not_installed():
    package = Path(torch_winnow.__file__).parent
    assert not list(package.rglob("libtorch_cuda*"))
    assert not list(Path(_library._path_of("_cpu")).parent.glob("libtorch_cuda*"))


def test_machine_code_for_ampere_and_hopper_and_ptx_for_later(cuda_library):
    content = cuda_library.read_bytes()
    assert b"sm_80" in content
    assert b"sm_90a" in content
    assert str(ROOT).encode() not in content


def test_every_operator_of_the_host_library_is_in_it(cuda_library, gpu):
    """What the tests execute on the host is what a GPU runs: no source is left out of a build."""
    content = cuda_library.read_bytes()
    missing = [name for name in host_library.operators() if name.encode() not in content]
    assert not missing

"""How the CUDA operators are built and loaded, on machines without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_winnow
from test_build_errors import CMAKE, ROOT, configure
from test_package import python
from torch_winnow import _library

CUDA_LIBRARY = _library._path_of("_cuda")

configures = pytest.mark.skipif(
    CMAKE is None or not (ROOT / "CMakeLists.txt").exists(), reason="configures with cmake"
)
reads_library = pytest.mark.skipif(
    CUDA_LIBRARY is None or not shutil.which("readelf"), reason="reads _cuda.so with readelf"
)


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
    expected = "libtorch_cuda" if CUDA_LIBRARY else "built without CUDA"
    assert re.search(rf"CUDA library: not loaded \(.*{expected}", done.stdout)
    assert done.stdout.rstrip().endswith("3.0")


@reads_library
def test_the_library_links_what_every_cuda_torch_has():
    text = subprocess.run(["readelf", "-d", CUDA_LIBRARY], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", text)
    assert "libtorch_cuda.so" in needed
    assert not [name for name in needed if "cudart" in name]  # static
    assert "RPATH" not in text
    assert "RUNPATH" not in text


@reads_library
def test_the_stub_is_not_installed():
    package = Path(torch_winnow.__file__).parent
    assert not list(package.rglob("libtorch_cuda*"))
    assert not list(Path(CUDA_LIBRARY).parent.glob("libtorch_cuda*"))


@reads_library
def test_machine_code_for_ampere_and_hopper_and_ptx_for_later():
    content = Path(CUDA_LIBRARY).read_bytes()
    assert b"sm_80" in content
    assert b"sm_90a" in content
    assert str(ROOT).encode() not in content

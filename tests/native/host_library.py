"""Compiles the CUDA sources for the host and puts their operators in the CPU's place.

The kernels of ``csrc/**/*.cu`` then run on CPU tensors, thread by thread and with every access to
memory checked, behind the same wrappers, fakes and autograd formulas as on a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
ORDERS = ("forward", "reverse", "shuffled")
NAMESPACE = "winnow_on_host"


def tool(name: str) -> str | None:
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def why_not() -> str | None:
    """What this machine lacks to compile the library."""
    if not (ROOT / "csrc").is_dir():
        return "needs the source checkout"
    if tool("cmake") is None:
        return "needs cmake"
    if not (os.environ.get("CXX") or tool("c++") or tool("g++")):
        return "needs a C++ compiler"
    return None


@functools.cache
def load() -> ctypes.CDLL:
    folder = ROOT / "build" / f"on-host-{torch.__version__}-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test processes build once
        cmake = tool("cmake")
        configure = [cmake, "-S", str(Path(__file__).parent), "-B", str(folder)]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE="]
        if ninja := tool("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        for command in (configure, [cmake, "--build", str(folder), "--parallel"]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}\n{done.stderr}")
    path = str(folder / "winnow_on_host.so")
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


def set_order(order: str) -> None:
    """The order in which blocks and threads take their turns."""
    load().winnow_on_host_set_order(ORDERS.index(order))


def launches() -> int:
    """How many kernels have been launched."""
    count = load().winnow_on_host_launches
    count.restype = ctypes.c_int64
    return int(count())


def operators() -> list[str]:
    """The operators that have a CUDA kernel."""
    load()
    return sorted(
        name.removeprefix(f"{NAMESPACE}::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(f"{NAMESPACE}::")
        and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
        and name != f"{NAMESPACE}::planted_bug"
    )


@contextlib.contextmanager
def in_place_of_the_cpu() -> Iterator[None]:
    """While it lasts, ``torch.ops.winnow`` runs the CUDA kernels on CPU tensors.

    What an operator allocates starts as NaN, so that a kernel cannot lean on zeros.
    """
    library = torch.library.Library("winnow", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden
        for name in operators():
            kernel = getattr(getattr(torch.ops, NAMESPACE), name).default
            library.impl(name, kernel, "CPU", allow_override=True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        library._destroy()
        set_order("forward")

"""Locates and loads the compiled libraries, and says how they were built."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass

import torch

_CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")
_OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class BuildInfo:
    """What :func:`torch_winnow.build_info` tells.

    Attributes:
        version: version of torch-winnow.
        torch_built: torch release whose headers the operators were compiled with.
        torch_running: torch release that is imported now (any from 2.11 on is served).
        compiler: C++ compiler and its version.
        capabilities: instruction-set variants in the library, weakest first.
        cpu_capability: the variant in use; ``WINNOW_CPU_CAPABILITY`` forces a weaker one.
        cuda_library: whether the CUDA operators are loaded.
        cuda_reason: why they are not, or an empty string.
    """

    version: str
    torch_built: str
    torch_running: str
    compiler: str
    capabilities: tuple[str, ...]
    cpu_capability: str
    cuda_library: bool
    cuda_reason: str

    def __str__(self) -> str:
        cuda = "loaded" if self.cuda_library else f"not loaded ({self.cuda_reason})"
        return (
            f"torch-winnow {self.version}\n"
            f"  torch: built against {self.torch_built}, running on {self.torch_running}\n"
            f"  compiler: {self.compiler}\n"
            f"  instruction set: {self.cpu_capability} (of {', '.join(self.capabilities)})\n"
            f"  CUDA library: {cuda}"
        )


def _path_of(module: str) -> str | None:
    # find_spec, not __file__: in an editable install Python and compiled files lie apart.
    spec = importlib.util.find_spec(f"torch_winnow.{module}")
    return spec.origin if spec is not None else None


def _check_torch() -> None:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < _OLDEST_TORCH:
        raise ImportError(
            f"torch-winnow needs torch 2.11 or newer, found torch {torch.__version__}. "
            "Upgrade it: pip install --upgrade 'torch>=2.11'"
        )


def _load_cpu() -> ctypes.CDLL:
    path = _path_of("_cpu")
    if path is None or _path_of("_core") is None:
        raise ImportError(
            "torch_winnow: the compiled operators are missing, or are those of another Python "
            "(torch_winnow/_cpu.so and _core). From a source checkout, build them first: "
            "pip install --no-build-isolation -e ."
        )
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"torch_winnow: the compiled operators do not load beside torch {torch.__version__}: "
            f"{error.__cause__ or error}. Reinstall the wheel for this platform (pip install "
            "--force-reinstall --no-deps torch-winnow), or build from source"
        ) from error
    library = ctypes.CDLL(path)
    library.winnow_cpu_capability.restype = ctypes.c_char_p
    library.winnow_best_cpu_capability.restype = ctypes.c_char_p
    library.winnow_set_cpu_capability.argtypes = [ctypes.c_char_p]
    library.winnow_fma_operations.argtypes = [ctypes.c_longlong, ctypes.c_int]
    library.winnow_fma_operations.restype = ctypes.c_double
    return library


def _load_cuda() -> str:
    """Why the CUDA operators are not loaded, or an empty string. Never a reason not to import."""
    if torch.version.cuda is None:
        return "torch without CUDA"
    path = _path_of("_cuda")
    if path is None:
        return "built without CUDA: no nvcc was found, or WINNOW_CUDA=OFF"
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{path}: {error.__cause__ or error}"
    return ""


def _check_requested_capability() -> None:
    wanted = os.environ.get("WINNOW_CPU_CAPABILITY")
    if wanted is None or wanted in available_cpu_capabilities():
        return
    raise ImportError(
        f"WINNOW_CPU_CAPABILITY: expected one of {', '.join(available_cpu_capabilities())} on this "
        f"machine, got {wanted!r}"
    )


def cpu_capability() -> str:
    """The instruction-set variant in use."""
    return str(cpu.winnow_cpu_capability().decode())


def available_cpu_capabilities() -> tuple[str, ...]:
    """The variants that this machine can run, weakest first."""
    best = cpu.winnow_best_cpu_capability().decode()
    return _CAPABILITIES[: _CAPABILITIES.index(best) + 1]


def set_cpu_capability(name: str) -> None:
    """Switch the variant, for tests and benchmarks; users set ``WINNOW_CPU_CAPABILITY``."""
    if not cpu.winnow_set_cpu_capability(name.encode()):
        raise ValueError(
            f"name: expected one of {', '.join(available_cpu_capabilities())}, got {name!r}"
        )


def build_info() -> BuildInfo:
    """How this installation was built and what it uses.

    Example:
        >>> import torch_winnow
        >>> torch_winnow.build_info().version
        '0.1.0'
    """
    from torch_winnow import _core

    built = _core.build()
    return BuildInfo(
        version=built["version"],
        torch_built=built["torch"],
        torch_running=torch.__version__,
        compiler=built["compiler"],
        capabilities=tuple(built["capabilities"].split()),
        cpu_capability=cpu_capability(),
        cuda_library=not cuda_reason,
        cuda_reason=cuda_reason,
    )


_check_torch()
cpu = _load_cpu()
cuda_reason = _load_cuda()
_check_requested_capability()

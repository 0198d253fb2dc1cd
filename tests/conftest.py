"""Fixtures that every family shares."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

import error_messages
import torch_winnow
from torch_winnow import _library

sys.path.insert(0, str(Path(__file__).parent / "native"))
import definitions  # noqa: E402
import host_library  # noqa: E402

try:
    import hypothesis
except ImportError:  # a bare GPU machine: its property tests are skipped, the others run
    absent = mock.MagicMock()
    absent.given.return_value = pytest.mark.skip(reason="needs hypothesis")
    absent.settings.return_value = lambda test: test
    sys.modules["hypothesis"] = absent
    sys.modules["hypothesis.strategies"] = absent.strategies
else:  # the same examples in every run, but where somebody looks for more
    hypothesis.settings.register_profile(
        "winnow", derandomize="WINNOW_FUZZ_EXAMPLES" not in os.environ
    )
    hypothesis.settings.load_profile("winnow")

RAISED: set[str] = set()  # texts of what pytest.raises caught


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-error",
        action="store_true",
        help="fail where the sources hold a message that no test has raised (for the whole suite)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--every-error"):
        return
    leave = pytest.RaisesExc.__exit__

    def record(self: object, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            RAISED.add(str(error))
        return leave(self, kind, error, trace)

    pytest.RaisesExc.__exit__ = record


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--every-error"):
        missing = error_messages.not_among(RAISED)
        print("\n", *(f"raised by no test: {message}" for message in missing), sep="\n")
        session.exitstatus = session.exitstatus or int(bool(missing))


HAS_GPU = torch.cuda.is_available() and torch_winnow.build_info().cuda_library
if HAS_GPU:
    definitions.use_the_cpu()
FLOATING = (torch.float32, torch.bfloat16, torch.float16)

# Against a float64 oracle on the same (rounded) inputs: the error of the result's own rounding.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
}


@pytest.fixture(params=FLOATING, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@contextlib.contextmanager
def running_on(capability: str) -> Iterator[None]:
    before = _library.cpu_capability()
    _library.set_cpu_capability(capability)
    try:
        yield
    finally:
        _library.set_cpu_capability(before)


@pytest.fixture(params=_library.available_cpu_capabilities())
def cpu_capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that this machine has."""
    with running_on(request.param):
        yield request.param


@pytest.fixture(
    params=[*_library.available_cpu_capabilities(), "cuda" if HAS_GPU else "cuda-on-host"]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Runs the test on the CPU, once per instruction set, and with the CUDA kernels (see gpu)."""
    if request.param.startswith("cuda"):
        yield request.getfixturevalue("gpu")
        return
    with running_on(request.param):
        yield torch.device("cpu")


@pytest.fixture
def on_every_capability() -> Callable[[Callable[[], object]], list[object]]:
    """Calls a function under each instruction set and returns the results, weakest first."""

    def run(function: Callable[[], object]) -> list[object]:
        results = []
        for name in _library.available_cpu_capabilities():
            with running_on(name):
                results.append(function())
        return results

    return run


@pytest.fixture
def on_thread_counts() -> Iterator[Callable[[Callable[[], object]], list[object]]]:
    """Calls a function with 1, 2, 3 and 7 threads and returns the results."""
    before = torch.get_num_threads()

    def run(function: Callable[[], object]) -> list[object]:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(function())
        return results

    yield run
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """Where the CUDA kernels run: on a GPU, or else on CPU tensors, executed thread by thread."""
    if HAS_GPU:
        yield torch.device("cuda")
        return
    if reason := host_library.why_not():
        pytest.skip(reason)
    with host_library.in_place_of_the_cpu():
        yield torch.device("cpu")


@pytest.fixture
def on_every_order(
    gpu: torch.device,
) -> Callable[[Callable[[], object]], list[object]]:
    """Calls a function with threads and blocks taking turns in several orders."""

    def run(function: Callable[[], object]) -> list[object]:
        results = []
        for order in host_library.ORDERS:
            if gpu.type == "cpu":
                host_library.set_order(order)
            results.append(function())
        return results

    return run


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

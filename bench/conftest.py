"""What every benchmark shares: the machine's limits, and the two tags that the report reads.

A benchmark file parametrises over ``impl`` ("winnow" or a rival's name) and over shapes, checks the
output against the definition, and then calls ``measure(group, impl, function)``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from torch_winnow import _library


def _best_rate(work: Callable[[], float], seconds: float = 0.5) -> float:
    """The highest work per second over short repetitions: a limit is what the machine can do."""
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        amount = work()
        best = max(best, amount / (time.perf_counter() - start))
    return best


@pytest.fixture(scope="session")
def limits() -> dict[str, float]:
    """Read bandwidth (bytes/s) and multiply-add rates (operations/s), measured in this run."""
    buffer = torch.randn(64 * 2**20)  # 256 MiB: beyond any cache

    def read() -> float:
        buffer.amax()
        return float(buffer.nbytes)

    threads = torch.get_num_threads()

    def fma(bf16: int) -> float:
        with ThreadPoolExecutor(threads) as pool:
            calls = [
                pool.submit(_library.cpu.winnow_fma_operations, 5_000_000, bf16)
                for _ in range(threads)
            ]
            return sum(call.result() for call in calls)

    return {
        "read_bytes_per_s": _best_rate(read),
        "fma_per_s": _best_rate(lambda: fma(0)),
        "bf16_fma_per_s": _best_rate(lambda: fma(1)),
    }


@pytest.fixture
def measure(benchmark, limits):
    """``measure(group, impl, function, *, inputs, moved_bytes, operations, bf16)`` times a call.

    ``inputs`` is a list of argument tuples that are rotated, so that a claim about memory is not
    measured from a cache. ``moved_bytes`` or ``operations`` is the least work that the definition
    needs; the report divides it by the limit measured in this run.
    """

    def run(
        group: str,
        impl: str,
        function: Callable[..., object],
        *,
        inputs: Iterable[tuple] = ((),),
        moved_bytes: float = 0.0,
        operations: float = 0.0,
        bf16: bool = False,
        rounds: int = 15,
    ) -> object:
        rotation = list(inputs)
        turn = 0

        def call() -> object:
            nonlocal turn
            turn += 1
            return function(*rotation[turn % len(rotation)])

        for _ in range(2):
            call()  # warm up: compiled rivals, caches, page faults
        start = time.perf_counter()
        call()
        call_s = time.perf_counter() - start
        benchmark.group = group
        rate = limits["bf16_fma_per_s" if bf16 else "fma_per_s"]
        benchmark.extra_info.update(
            impl=impl,
            limit_s=max(moved_bytes / limits["read_bytes_per_s"], operations / rate),
            limits=limits,
            threads=torch.get_num_threads(),
            cpu_capability=_library.cpu_capability(),
            torch=torch.__version__,
        )
        # A round lasts at least 200 µs, so that the clock and this wrapper do not show.
        iterations = max(1, min(1000, int(2e-4 / call_s)))
        return benchmark.pedantic(call, rounds=rounds, iterations=iterations)

    return run


def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    """Results are published: the processor matters, the host's name does not."""
    machine_info.pop("node", None)

"""Times device work: events around rotating inputs beyond the cache, graph replays for small ops.

Without a GPU everything runs on the CPU's clock and on small shapes, which rehearses the code and
measures nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

CACHE_BYTES = 256 * 2**20  # inputs of one rotation exceed this: no L2 is larger


def bytes_of(arguments: Any) -> int:
    if isinstance(arguments, torch.Tensor):
        return arguments.nbytes
    if isinstance(arguments, dict):
        return sum(bytes_of(value) for value in arguments.values())
    if isinstance(arguments, list | tuple):
        return sum(bytes_of(value) for value in arguments)
    return 0


def rotation(make: Callable[[], tuple], device: torch.device) -> list[tuple]:
    """As many sets of arguments as do not fit the cache together."""
    first = make()
    if device.type != "cuda":
        return [first]
    count = min(64, max(2, 1 + CACHE_BYTES // max(1, bytes_of(first))))
    return [first, *(make() for _ in range(count - 1))]


def seconds(
    function: Callable[..., Any], inputs: Sequence[tuple], device: torch.device, rounds: int = 15
) -> float:
    """Median time of a call."""
    for arguments in inputs[:2]:
        function(*arguments)  # compiles, allocates
    if device.type != "cuda":
        start = time.perf_counter()
        function(*inputs[0])
        return time.perf_counter() - start
    torch.cuda.synchronize()
    graph = _captured(function, inputs)

    def replay() -> None:
        if graph is not None:
            graph.replay()
            return
        for arguments in inputs:
            function(*arguments)

    replay()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(inputs))
    return statistics.median(times)


def _captured(function: Callable[..., Any], inputs: Sequence[tuple]) -> torch.cuda.CUDAGraph | None:
    """The whole rotation as one graph, so that launches cost what they cost a decoder; None where
    the function cannot be captured (a rival that synchronises)."""
    # Found out beforehand: a capture that fails leaves torch's generator unusable.
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*inputs[0])
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for arguments in inputs:
                function(*arguments)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


def limits(device: torch.device) -> dict[str, float]:
    """Copy bandwidth in bytes/s (read and written) and the bf16 matmul rate in operations/s."""
    size = 2**30 if device.type == "cuda" else 2**20
    sources = [torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2)]
    target = torch.empty_like(sources[0])
    copy = seconds(lambda source: target.copy_(source), [(s,) for s in sources], device)
    n = 8192 if device.type == "cuda" else 64
    a, b = torch.randn(2, n, n, device=device).to(torch.bfloat16)
    product = torch.empty_like(a)
    multiply = seconds(lambda x, y: torch.matmul(x, y, out=product), [(a, b)] * 2, device)
    return {"copy_bytes_per_s": 2 * size / copy, "matmul_per_s": 2 * n**3 / multiply}

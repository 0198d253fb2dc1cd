"""``python -m torch_winnow``: what is installed here, and whether it computes what it should.

The self-check runs one operator per family against its definition, on every instruction set that
the machine has and on the GPU where the CUDA operators are loaded. It needs the wheel alone and
takes a few seconds; the exit status is 1 where a result is wrong or the operators do not load.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_winnow import _library, attention, build_info, kvcache, reference, resampling, unmasking

# The CPU's inputs of an operator, and operator and definition as functions of them.
Inputs = tuple[Tensor, ...]
Check = tuple[Inputs, Callable[..., Tensor], Callable[..., Tensor]]


def _attention(draw: torch.Generator) -> Check:
    def call(family: Any, *inputs: Tensor) -> Tensor:
        return family.cat_attention(*inputs, block_size=9)  # type: ignore[no-any-return]

    inputs = torch.randn(3, 1, 2, 50, 16, generator=draw).unbind()
    return inputs, partial(call, attention), partial(call, reference)


def _resampling(draw: torch.Generator) -> Check:
    def call(family: Any, log_weights: Tensor, uniforms: Tensor) -> Tensor:
        return family.resample(log_weights, uniforms=uniforms).offspring.float()  # type: ignore[no-any-return]

    inputs = (torch.randn(64, 33, generator=draw), torch.rand(64, generator=draw))
    return inputs, partial(call, resampling), partial(call, reference)


def _unmasking(draw: torch.Generator) -> Check:
    def call(family: Any, logits: Tensor) -> Tensor:
        return family.logit_stats(logits).entropy  # type: ignore[no-any-return]

    inputs = (torch.randn(2, 5, 9999, generator=draw),)
    return inputs, partial(call, unmasking), partial(call, reference)


def _kvcache(draw: torch.Generator) -> Check:
    def paged(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        pool = kvcache.BlockPool(
            4,
            num_layers=1,
            num_kv_heads=2,
            head_dim=16,
            block_size=16,
            dtype=torch.float32,
            device=query.device,
        )
        cache = kvcache.PagedKVCache(pool, 1)
        cache.append(0, key, value)
        pages = (pool.key_pages[0], pool.value_pages[0])
        return kvcache.paged_attention(query, *pages, cache.block_table, cache.seq_lens)

    def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # One block of all rows.
        out = reference.block_diagonal_attention(query, key, value, block_size=50, causal=True)
        assert isinstance(out, Tensor)
        return out

    return torch.randn(3, 1, 2, 50, 16, generator=draw).unbind(), paged, dense


CHECKS: dict[str, Callable[[torch.Generator], Check]] = {
    "attention": _attention,
    "resampling": _resampling,
    "unmasking": _unmasking,
    "kvcache": _kvcache,
}


def _places() -> Iterator[tuple[str, torch.device]]:
    """Every instruction set in turn, then the GPU."""
    before = _library.cpu_capability()
    for name in _library.available_cpu_capabilities():
        _library.set_cpu_capability(name)
        yield name, torch.device("cpu")
    _library.set_cpu_capability(before)
    if build_info().cuda_library and torch.cuda.is_available():
        yield torch.cuda.get_device_name(), torch.device("cuda")


def _outcome(check: Callable[[torch.Generator], Check], device: torch.device) -> str:
    """An empty string where the operator agrees with its definition, else what went wrong."""
    inputs, operator, definition = check(torch.Generator().manual_seed(0))
    try:
        result = operator(*(tensor.to(device) for tensor in inputs)).cpu()
        # Definitions make masks and indices on the CPU, so they are evaluated there.
        torch.testing.assert_close(result, definition(*inputs), rtol=1e-4, atol=1e-4)
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error)
    return ""


def main() -> int:
    print(build_info())
    threads = torch.get_num_threads()
    print(f"  Python: {platform.python_version()}, {platform.platform()}, {threads} threads")
    start = time.perf_counter()
    wrong = 0
    for place, device in _places():
        outcomes = {family: _outcome(check, device) for family, check in CHECKS.items()}
        failures = {family: text for family, text in outcomes.items() if text}
        passed = [family for family in outcomes if family not in failures]
        print(f"  self-check, {place}: {', '.join(passed) or 'nothing'} right")
        for family, text in failures.items():
            print(f"  self-check, {place}: {family} WRONG\n{text}")
        wrong += len(failures)
    print(f"  self-check: {time.perf_counter() - start:.1f} s, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

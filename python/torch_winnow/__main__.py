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

import torch

from torch_winnow import _library, attention, build_info, kvcache, reference, resampling, unmasking

# An operator's result and its definition's, on inputs of a device.
Check = Callable[[torch.device], tuple[object, object]]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _attention(device: torch.device) -> tuple[object, object]:
    query, key, value = torch.randn(3, 1, 2, 50, 16, generator=_generator()).to(device)
    return (
        attention.cat_attention(query, key, value, block_size=9),
        reference.cat_attention(query, key, value, block_size=9),
    )


def _resampling(device: torch.device) -> tuple[object, object]:
    log_weights = torch.randn(64, 33, generator=_generator()).to(device)
    uniforms = torch.rand(64, generator=_generator()).to(device)
    offspring = resampling.resample(log_weights, uniforms=uniforms).offspring
    expected = reference.resample(log_weights, uniforms=uniforms).offspring
    return offspring.float(), expected.float()


def _unmasking(device: torch.device) -> tuple[object, object]:
    logits = torch.randn(2, 5, 9999, generator=_generator()).to(device)
    return unmasking.logit_stats(logits).entropy, reference.logit_stats(logits).entropy


def _kvcache(device: torch.device) -> tuple[object, object]:
    query, key, value = torch.randn(3, 1, 2, 50, 16, generator=_generator()).to(device)
    pool = kvcache.BlockPool(
        4,
        num_layers=1,
        num_kv_heads=2,
        head_dim=16,
        block_size=16,
        dtype=torch.float32,
        device=device,
    )
    cache = kvcache.PagedKVCache(pool, 1)
    cache.append(0, key, value)
    pages = (pool.key_pages[0], pool.value_pages[0], cache.block_table, cache.seq_lens)
    return kvcache.paged_attention(query, *pages), reference.paged_attention(query, *pages)


CHECKS: dict[str, Check] = {
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


def _outcome(check: Check, device: torch.device) -> str:
    """An empty string where the operator agrees with its definition, else what went wrong."""
    try:
        torch.testing.assert_close(*check(device), rtol=1e-4, atol=1e-4)
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

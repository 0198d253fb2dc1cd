"""A result that no memory can hold is refused in a sentence that says how much was asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import torch_winnow as w

VAST = 1 << 47  # bytes that a 64-bit machine can address


def expanded(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of a few bytes with the shape of a vast one."""
    return torch.zeros(shape[-1], dtype=dtype).expand(*shape)


CALLS: dict[str, Callable[[], object]] = {
    "attention": lambda: w.attention.block_diagonal_attention(
        *(3 * [expanded(1, VAST, 1, 4)]), block_size=8
    ),
    "attention, a copy": lambda: w.attention.merge_attention(
        [torch.zeros(1).expand(VAST, 1, 1, 4)] * 2, [expanded(VAST, 1, 1)] * 2
    ),
    "resampling": lambda: w.resampling.effective_sample_size(expanded(VAST, 4)),
    "resampling, samples": lambda: w.resampling.resample(
        expanded(VAST >> 40, 4), num_samples=1 << 40, seed=0
    ),
    "resampling, more than can be counted": lambda: w.resampling.resample(
        expanded(VAST, 4), num_samples=1 << 40, seed=0
    ),
    "unmasking": lambda: w.unmasking.select_positions(
        expanded(VAST, 4), expanded(VAST, 4, dtype=torch.bool), w.unmasking.ConfidenceThreshold(0.5)
    ),
    "kvcache": lambda: w.kvcache.block_summaries(
        expanded(1, VAST, 1, 4),
        torch.zeros(1, 1, dtype=torch.int32),
        torch.ones(1, dtype=torch.int32),
    ),
}


@pytest.mark.parametrize("family", CALLS)
def test_says_how_much_memory_was_asked_for(family):
    with pytest.raises(RuntimeError) as error:
        CALLS[family]()
    size, dtype, shape = r"[0-9.]+ GiB", r"a (float32|float64|int64)", r"\([0-9, ]+\)"
    assert error.match(
        rf"^CPU out of memory\. An operator of torch-winnow asked for {size}, {dtype} tensor of "
        rf"shape {shape}\. Use a smaller batch or shorter sequences"
    )


def test_the_size_is_the_one_of_the_tensor():
    with pytest.raises(RuntimeError, match=r"524288\.00 GiB, a float32 tensor of shape \(1407"):
        w.resampling.effective_sample_size(expanded(VAST, 4))


def test_loops_that_retry_with_a_smaller_batch_see_it():
    """What accelerate.find_executable_batch_size searches for."""
    with pytest.raises(RuntimeError) as error:
        CALLS["unmasking"]()
    assert len(error.value.args) == 1
    assert " out of memory." in error.value.args[0]

"""The emulator finds what is wrong with a kernel, and nothing in kernels that are right."""

from __future__ import annotations

import re

import host_library
import pytest
import torch

pytestmark = pytest.mark.skipif(bool(host_library.why_not()), reason=str(host_library.why_not()))

NEIGHBOURS, WARP_SUMS, REVERSE_WARPS, COPY_VECTORS, COPIED, *PRODUCTS = range(7)
TOO_WIDE, TOO_HIGH, MEETING, THROUGH_MEMORY, ADD_UP, SIGNS, NO_STREAM = range(7, 14)
BUGS = [
    "none",
    "missing_barrier",
    "late_barrier",
    "tail_off_by_one",
    "negative_index",
    "shuffle_mask",
    "own_lane_masked",
    "source_lane",
    "divergent_barrier",
    "early_return",
    "uninitialised",
    "missing_warp_sync",
    "missing_wait",
    "early_wait",
    "wait_no_barrier",
    "unfinished_copy",
    "shared_too_small",
    "fragment_column",
    "fragment_transposed",
    "not_together",
    "missing_block",
    "unordered_read",
    "unordered_write",
    "unordered_lanes",
    "other_block",
    "one_target",
    "plain_sum",
    "early_sum",
    "shared_byte",
]


@pytest.fixture(params=host_library.ORDERS, autouse=True)
def _order(request: pytest.FixtureRequest):
    host_library.set_order(request.param)
    yield
    host_library.set_order("forward")


def run(kernel: int, bug: str = "none", n: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    host_library.load()
    x = torch.randn(n)
    return x, torch.ops.winnow_on_host.planted_bug(x, kernel, BUGS.index(bug))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 100, 256])
def test_right_kernels_pass(n):
    x, y = run(NEIGHBOURS, n=n)
    torch.testing.assert_close(y, x + torch.cat([torch.zeros(1), x[:-1]]))
    x, y = run(WARP_SUMS, n=n)
    expected = torch.cat([warp.cumsum(0) for warp in x.split(32)])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    x, y = run(COPY_VECTORS, n=4 * n)
    assert torch.equal(x, y)


def test_warps_exchange_through_shared_memory():
    x, y = run(REVERSE_WARPS, n=128)
    assert torch.equal(y, x.view(4, 32).flip(1).flatten())


@pytest.mark.parametrize("n", [64, 256])
def test_threads_exchange_through_global_memory(n):
    x, y = run(THROUGH_MEMORY, n=n)
    assert torch.equal(y, x.view(-1, 2, 32).flip(1).flatten())
    x, y = run(ADD_UP, n=n)
    blocks = x.int().view(-1, 64).sum(1)
    assert torch.equal(y[: n // 64 + 1].int(), torch.cat([blocks.sum()[None], blocks]))
    x, y = run(SIGNS, n=n)
    assert torch.equal(y.view(torch.uint8)[:n].bool(), x > 0)


@pytest.mark.parametrize("n", [4, 256, 260, 1024])
def test_copies_arrive(n):
    x, y = run(COPIED, n=n)
    padded = torch.cat([x, torch.zeros(-n % 256)]).view(-1, 64, 4)
    assert torch.equal(y, padded.flip(1).flatten()[:n])


@pytest.mark.parametrize("n", [60, 64, 200])
def test_blocks_meet(n):
    x, y = run(MEETING, n=n)
    assert torch.equal(y, x.flip(0))


@pytest.mark.parametrize(
    ("kernel", "dtype"), list(zip(PRODUCTS, [torch.bfloat16, torch.float16], strict=True))
)
def test_matrix_products_have_the_documented_layout(kernel, dtype):
    x, y = run(kernel, n=512)
    a, b = x.to(dtype).float().view(2, 16, 16)
    torch.testing.assert_close(y[:256].view(16, 16), a @ b, rtol=1e-5, atol=1e-5)
    for bug in ("fragment_column", "fragment_transposed"):
        x, y = run(kernel, bug, n=512)
        a, b = x.to(dtype).float().view(2, 16, 16)
        assert not torch.allclose(y[:256].view(16, 16), a @ b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("kernel", "bug", "found"),
    [
        (NEIGHBOURS, "missing_barrier", "shared memory"),
        (NEIGHBOURS, "late_barrier", "no barrier in between"),
        (NEIGHBOURS, "tail_off_by_one", "reads 4 bytes of global memory at byte 400 of 400"),
        (NEIGHBOURS, "negative_index", "reads 4 bytes of global memory at byte -4 of 400"),
        (WARP_SUMS, "shuffle_mask", "with mask 0xffffffff, where 0xf have come"),
        (WARP_SUMS, "own_lane_masked", "the mask leaves out the calling lane"),
        (WARP_SUMS, "source_lane", "reads lane 31, which the mask leaves out"),
        (NEIGHBOURS, "divergent_barrier", "threads wait for each other in vain"),
        (NEIGHBOURS, "early_return", "returned"),
        (NEIGHBOURS, "uninitialised", "that nobody has written"),
        (REVERSE_WARPS, "missing_warp_sync", "shared memory"),
        (COPIED, "missing_wait", "before the asynchronous copy of thread"),
        (COPIED, "early_wait", "before the asynchronous copy of thread"),
        (COPIED, "wait_no_barrier", "shared memory"),
        (COPIED, "unfinished_copy", "returns while asynchronous copies are under way"),
        (COPIED, "shared_too_small", "more dynamic shared memory than its launch names"),
        (MEETING, "not_together", "waits for other blocks, which this launch does not run"),
        (MEETING, "missing_block", "blocks wait for each other in vain"),
        (THROUGH_MEMORY, "unordered_read", "global memory that thread"),
        (THROUGH_MEMORY, "unordered_write", "global memory that thread"),
        (THROUGH_MEMORY, "unordered_lanes", "global memory that thread"),
        (THROUGH_MEMORY, "other_block", "global memory that block ("),
        (THROUGH_MEMORY, "one_target", "writes global memory that block ("),
        (ADD_UP, "plain_sum", "global memory that thread"),
        (ADD_UP, "early_sum", "global memory that thread"),
        (SIGNS, "shared_byte", "writes global memory that thread"),
    ],
)
def test_planted_bugs_are_found(kernel, bug, found):
    with pytest.raises(RuntimeError) as caught:
        run(kernel, bug, n=128 if kernel == THROUGH_MEMORY else 100)
    text = str(caught.value)
    assert found in text
    assert re.match(r"\w+: block \(", text)


def test_misaligned_vectors_are_found():
    host_library.load()
    x = torch.randn(101)[1:]
    with pytest.raises(RuntimeError, match="not aligned to 16 bytes"):
        torch.ops.winnow_on_host.planted_bug(x, COPY_VECTORS, 0)


@pytest.mark.parametrize(
    ("kernel", "blocks"), [(TOO_WIDE, "2147483648 by 1"), (TOO_HIGH, "1 by 65536")]
)
def test_a_launch_of_too_many_blocks_is_refused(kernel, blocks):
    with pytest.raises(ValueError, match=f"copy_vectors: expected .* got {blocks}"):
        run(kernel)


def test_a_pointer_without_a_stream_is_found():
    with pytest.raises(ValueError, match=r"shape \(100,\) is taken before there is a Stream"):
        run(NO_STREAM)


def test_an_emulated_fault_leaves_the_emulator_usable():
    with pytest.raises(RuntimeError):
        run(NEIGHBOURS, "early_return")
    test_right_kernels_pass(65)


def test_operators_return_to_the_cpu():
    x = torch.randn(3, 40)
    before = torch.ops.winnow.effective_sample_size(x)
    with host_library.in_place_of_the_cpu():
        torch.testing.assert_close(torch.ops.winnow.effective_sample_size(x), before)
        with pytest.raises(RuntimeError, match="global memory"):
            torch.ops.winnow_on_host.planted_bug(x, NEIGHBOURS, 3)
    assert torch.equal(torch.ops.winnow.effective_sample_size(x), before)
    assert not torch.are_deterministic_algorithms_enabled()

"""Nothing is read behind the pages: they end where the memory ends, at a page that may not be read.

A stray read ends the process, so it is one of its own.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, mmap
import torch
from torch_winnow import _library
from torch_winnow.kvcache import attention_mass, block_summaries, paged_attention

libc = ctypes.CDLL(None, use_errno=True)
kept = []


def at_the_end(tensor):
    "A copy whose last byte is the last one that may be read."
    size = max(tensor.nbytes, 1)
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    wall = ctypes.c_void_p(address + whole)
    assert libc.mprotect(wall, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0, ctypes.get_errno()
    kept.append(memory)
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=whole - size)
    return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)


cases = [(1, 1, 1), (1, 17, 33), (3, 33, 16), (16, 31, 65), (64, 70, 47), (70, 128, 128),
         (256, 255, 1)]


def store(pages, scales, table):
    last = torch.tensor([[pages[0].shape[2] - 1]])
    tokens = [torch.randn(1, p.shape[1], 1, p.shape[3]) for p in pages]
    if scales:
        torch.ops.winnow.paged_quantise_(*pages, *scales, *tokens, table[1:, 1:].clone(), last)
    else:
        tokens = [t.to(pages[0].dtype) for t in tokens]
        torch.ops.winnow.paged_write_(*pages, *tokens, table[1:, 1:].clone(), last)


def attempt(dtype):
    codes = dtype in (torch.int8, torch.float8_e4m3fn)
    for number, (size, dim, value_dim) in enumerate(cases):
        queries = 1 + 2 * (number % 2)
        blocks, heads, group = 3, 2, 3
        pages = [torch.randn(blocks, heads, size, d) for d in (dim, value_dim)]
        pages = [at_the_end((x * 20).clamp(-127, 127).round().to(dtype)) for x in pages]
        query = at_the_end(
            torch.randn(2, heads * group, queries, dim).to(torch.float32 if codes else dtype)
        )
        if codes and size % 2:
            query = at_the_end(query.bfloat16())
        table = at_the_end(torch.tensor([[0, 2], [1, 2]], dtype=torch.int32))
        lengths = at_the_end(torch.tensor([2 * size, size + 1], dtype=torch.int32))
        scales = [at_the_end(torch.rand(blocks, heads)) for _ in pages] if codes else []
        names = ("key_scales", "value_scales")
        options = dict(zip(names, scales))
        bias = at_the_end(torch.randn(blocks, heads, size))
        chosen = at_the_end(torch.tensor([[[0, 1], [1, -1]]] * 2, dtype=torch.int32))
        for capability in _library.available_cpu_capabilities():
            _library.set_cpu_capability(capability)
            store(pages, scales, table)
            attend = lambda **more: paged_attention(
                query, *pages, table, lengths, **options, **more)
            plain = paged_attention(
                query.clone(), *(x.clone() for x in pages), table, lengths, **options)
            assert torch.equal(attend(), plain)
            attend(key_bias=bias, causal=False)
            attend(block_indices=chosen, window=5, sinks=1)
            block_summaries(pages[0], table, lengths, "minmax", key_scales=options.get(names[0]))
            attention_mass(
                query, pages[0], table, lengths, key_bias=bias, key_scales=options.get(names[0]))


torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn):
    print(dtype, flush=True)
    attempt(dtype)
    kept.clear()
print("whole")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect of Linux")
def test_reads_end_with_the_pages():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300
    )
    assert result.stdout.endswith("whole\n"), (result.stdout, result.stderr[-2000:])

"""The definition of every operator: one plain-PyTorch function each, same name and signature.

No cleverness and no speed: tests hold the kernels to these functions, benchmarks compare with them.
"""

from torch_winnow.reference.attention import (
    block_diagonal_attention,
    cat_attention,
    chunk_attention,
    merge_attention,
)
from torch_winnow.reference.resampling import effective_sample_size

__all__ = [
    "block_diagonal_attention",
    "cat_attention",
    "chunk_attention",
    "effective_sample_size",
    "merge_attention",
]

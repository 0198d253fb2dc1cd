"""The definition of every operator: one plain-PyTorch function each, same name and signature.

No cleverness and no speed: tests hold the kernels to these functions, benchmarks compare with them.
"""

from torch_winnow.reference.kvcache import paged_attention
from torch_winnow.reference.resampling import effective_sample_size

__all__ = ["effective_sample_size", "paged_attention"]

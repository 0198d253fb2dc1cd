"""Small models built on the operators: trainable on a CPU, and generating through paged caches.

- :class:`CompressAttendTransformer`: one vector per chunk of context, chunk size chosen per call.
- :class:`DenseDecoder`: a plain causal transformer of the same layers, to compare with.
- :func:`speculative_sample`: drafts of one read by the other, several tokens in one pass.
- :class:`MaskedDiffusion`: fills in masked tokens in any order.
"""

from torch_winnow.models.cat import CATConfig, CompressAttendTransformer, Compressor
from torch_winnow.models.cat_decoding import CATDecoding
from torch_winnow.models.decoding import Decoding, sample
from torch_winnow.models.dense import DenseConfig, DenseDecoder, DenseDecoding
from torch_winnow.models.layers import StackConfig
from torch_winnow.models.masked_diffusion import MaskedDiffusion, MaskedDiffusionConfig
from torch_winnow.models.released_cat import load_released_cat
from torch_winnow.models.speculation import Speculation, speculative_sample

__all__ = [
    "CATConfig",
    "CATDecoding",
    "CompressAttendTransformer",
    "Compressor",
    "Decoding",
    "DenseConfig",
    "DenseDecoder",
    "DenseDecoding",
    "MaskedDiffusion",
    "MaskedDiffusionConfig",
    "Speculation",
    "StackConfig",
    "load_released_cat",
    "sample",
    "speculative_sample",
]

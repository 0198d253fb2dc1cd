"""Checkpoints of the authors' CAT implementation as a :class:`CompressAttendTransformer`.

The layout is that of https://github.com/rajesh-lab/cat-transformer, which accompanies the paper
(arXiv 2511.05313), fixed and adaptive:

========================  ==========================================================================
released parameter        meaning
========================  ==========================================================================
``f.*``                   the compressor, ``f.layers`` and ``f.norm`` its stack
``f.wte``, ``wte``        token embeddings of compressor and decoder
``f.pos_tokens``          the row that tells the compressor a chunk's place
``f.adaptive_token``      the row that tells it the chunk size, row p for size 2^p (adaptive)
``f.proj_fx``             features of a chunk to its vector; stretched to smaller chunks (adaptive)
``dummy_fx``              vector 0; row p for size 2^p (adaptive)
``seperator``             the row between a vector and its tokens, spelled so (adaptive)
``layers``, ``norm``      the decoder's stack
``output``                the head
========================  ==========================================================================

A fixed model has blocks of ``1 + C`` rows, an adaptive one of ``2 + C``; rotary positions are
offsets in the block. The released forward returns the distribution of token t + 1 at index t, ours
that of token t, the first one included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from torch_winnow.models.cat import CATConfig, CompressAttendTransformer
from torch_winnow.models.layers import StackConfig

__all__ = ["load_released_cat"]

_LAYER = {
    "attention_norm.weight": "attention_norm.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "qkv.weight": "attention.wqkv.weight",
    "out.weight": "attention.wo.weight",
    "down.weight": "feed_forward.proj.weight",
}

_LAYER_NAME = (
    r"layers\.\d+\.(attention\.(wqkv|wo)|feed_forward\.(fc_1|fc_2|proj)|(attention|ffn)_norm)"
)
_KNOWN = re.compile(
    rf"((f\.)?(wte|norm|{_LAYER_NAME})|f\.(pos_tokens|adaptive_token|proj_fx)"
    r"|dummy_fx|seperator|output)\.weight"
)


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    depth = 0
    while f"{prefix}layers.{depth}.attention.wqkv.weight" in state:
        depth += 1
    return depth


def _stack(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters of a released stack under the names of ours."""
    ours = {"norm.weight": state[f"{prefix}norm.weight"]}
    for i in range(_depth(state, prefix)):
        layer = f"{prefix}layers.{i}."
        for name, released in _LAYER.items():
            ours[f"layers.{i}.{name}"] = state[layer + released]
        gate_up = (state[f"{layer}feed_forward.fc_{n}.weight"] for n in (1, 2))
        ours[f"layers.{i}.gate_up.weight"] = torch.cat(tuple(gate_up))
    return ours


def _stack_config(
    state: Mapping[str, Tensor], prefix: str, heads: int, rotary_base: float
) -> StackConfig:
    first = f"{prefix}layers.0."
    width = state[f"{prefix}wte.weight"].shape[1]
    # Rows of queries, keys and values: (heads + 2 * kv_heads) * head_dim.
    rows = state[first + "attention.wqkv.weight"].shape[0]
    head_dim = max(1, width // heads)
    return StackConfig(
        width=width,
        depth=_depth(state, prefix),
        heads=heads,
        kv_heads=(rows // head_dim - heads) // 2,
        hidden=state[first + "feed_forward.fc_1.weight"].shape[0],
        rotary_base=rotary_base,
    )


def load_released_cat(
    state: Mapping[str, Tensor],
    *,
    heads: int,
    compressor_heads: int,
    rotary_base: float = 10_000.0,
) -> CompressAttendTransformer:
    """A model with the weights of a released checkpoint; it trains, scores and generates.

    Everything but the heads is read off the shapes.

    Args:
        state: the released model's ``state_dict()``.
        heads: query heads of the decoder, ``n_head`` in the released configuration.
        compressor_heads: query heads of the compressor.
        rotary_base: ``rope_base`` in the released configuration.

    Returns:
        A :class:`CompressAttendTransformer` in the dtype of the checkpoint, on the CPU.

    Raises:
        ValueError: if parameters are missing or unknown, or their shapes fit no model of so many
            heads.

    Example:
        ::

            state = torch.load("cat.pt", weights_only=True)
            model = load_released_cat(state, heads=12, compressor_heads=12)
            tokens = model.generate(prompt, 100, chunk_size=model.config.chunk_sizes[0])
    """
    unknown = sorted(name for name in state if not _KNOWN.fullmatch(name))
    if unknown:
        raise ValueError(f"state: expected the released layout, which has no {unknown[0]!r}")
    try:
        config, ours = _translate(state, heads, compressor_heads, rotary_base)
    except KeyError as error:
        raise ValueError(f"state: expected the released layout, which has {error}") from None
    model = CompressAttendTransformer(config).to(ours["embedding.weight"].dtype)
    try:
        model.load_state_dict(ours)
    except RuntimeError as error:
        raise ValueError(f"state: does not fit the released layout: {error}") from None
    return model


def _translate(
    state: Mapping[str, Tensor], heads: int, compressor_heads: int, rotary_base: float
) -> tuple[CATConfig, dict[str, Tensor]]:
    """The configuration that the shapes tell, and the weights under our names."""
    width = state["f.wte.weight"].shape[1]
    largest = state["f.proj_fx.weight"].shape[1] // width
    adaptive = "f.adaptive_token.weight" in state
    places = state["f.pos_tokens.weight"].shape[0]
    powers = state["dummy_fx.weight"].shape[0]
    config = CATConfig(
        decoder=_stack_config(state, "", heads, rotary_base),
        compressor=_stack_config(state, "f.", compressor_heads, rotary_base),
        chunk_sizes=tuple(2**p for p in range(powers)) if adaptive else (largest,),
        separator=adaptive,
        positions="block",
        projection="interpolated",
        vocab_size=state["wte.weight"].shape[0],
        max_tokens=places if adaptive else places * largest,
    )
    ours = {
        "embedding.weight": state["wte.weight"],
        "head.weight": state["output.weight"],
        "dummy_vectors": state["dummy_fx.weight"],
        "compressor.embedding.weight": state["f.wte.weight"],
        "compressor.position_rows": state["f.pos_tokens.weight"],
        "compressor.projection.weight": state["f.proj_fx.weight"],
    }
    ours |= {f"stack.{name}": value for name, value in _stack(state, "").items()}
    ours |= {f"compressor.stack.{name}": value for name, value in _stack(state, "f.").items()}
    if adaptive:
        ours["compressor.size_rows"] = state["f.adaptive_token.weight"]
        ours["separators"] = state["seperator.weight"].expand(powers, -1)
    return config, ours

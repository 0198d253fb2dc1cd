"""What the layout of a released CAT checkpoint means, in plain PyTorch.

One dense mask, one chunk at a time, no cache. ``attend`` is the call that ``cat_attention``
replaces.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_attend(query: Tensor, key: Tensor, value: Tensor, block_size: int) -> Tensor:
    row = torch.arange(query.shape[2])
    i, j = row[None, :], row[:, None]
    mask = (i <= j) & ((i // block_size == j // block_size) | (i % block_size == 0))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def parameters(
    *, width, heads, kv_heads, depth, compressor_width, chunk_size, length, vocab, adaptive
) -> dict[str, Tensor]:
    """Random weights under the released names."""
    state = {}

    def add(name: str, *shape: int) -> None:
        state[name] = torch.randn(*shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)

    def add_stack(prefix: str, width: int, qkv_rows: int, depth: int) -> None:
        hidden = 3 * width
        for i in range(depth):
            layer = f"{prefix}layers.{i}."
            add(f"{layer}attention.wqkv.weight", qkv_rows, width)
            add(f"{layer}attention.wo.weight", width, width)
            add(f"{layer}feed_forward.fc_1.weight", hidden, width)
            add(f"{layer}feed_forward.fc_2.weight", hidden, width)
            add(f"{layer}feed_forward.proj.weight", width, hidden)
            add(f"{layer}ffn_norm.weight", width)
            add(f"{layer}attention_norm.weight", width)
        add(f"{prefix}norm.weight", width)

    powers = int(math.log2(chunk_size)) + 1
    add("f.wte.weight", vocab, compressor_width)
    add("f.pos_tokens.weight", length if adaptive else length // chunk_size, compressor_width)
    add_stack("f.", compressor_width, 3 * compressor_width, 1)
    add("f.proj_fx.weight", width, chunk_size * compressor_width)
    add("dummy_fx.weight", powers if adaptive else 1, width)
    add("wte.weight", vocab, width)
    add_stack("", width, width + 2 * kv_heads * (width // heads), depth)
    add("output.weight", vocab, width)
    if adaptive:
        add("f.adaptive_token.weight", powers, compressor_width)
        add("seperator.weight", 1, width)
    return state


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    theta = 10000.0 ** (-torch.arange(half) / half)
    angle = positions[:, None] * theta
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        (
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
        ),
        -1,
    )


def _stack(state, prefix, x, positions, heads, attend):
    i = 0
    while f"{prefix}layers.{i}.ffn_norm.weight" in state:
        weight = {
            name.removeprefix(f"{prefix}layers.{i}.").removesuffix(".weight"): value
            for name, value in state.items()
            if name.startswith(f"{prefix}layers.{i}.")
        }
        batch, rows, width = x.shape
        dim = width // heads
        qkv = F.linear(_norm(x, weight["attention_norm"]), weight["attention.wqkv"])
        kv = (qkv.shape[-1] - width) // 2
        query, key, value = (
            part.view(batch, rows, -1, dim).transpose(1, 2)
            for part in qkv.split([width, kv, kv], dim=-1)
        )
        out = attend(_rotate(query, positions), _rotate(key, positions), value)
        x = x + F.linear(out.transpose(1, 2).reshape(batch, rows, width), weight["attention.wo"])
        h = _norm(x, weight["ffn_norm"])
        gate = F.silu(F.linear(h, weight["feed_forward.fc_1"]))
        x = x + F.linear(
            gate * F.linear(h, weight["feed_forward.fc_2"]), weight["feed_forward.proj"]
        )
        i += 1
    return _norm(x, state[f"{prefix}norm.weight"])


def _compress(state, chunk, place, power, heads):
    prefix = [state["f.pos_tokens.weight"][place]]
    if power is not None:
        prefix.insert(0, state["f.adaptive_token.weight"][power])
    x = torch.cat((torch.stack(prefix).expand(len(chunk), -1, -1), state["f.wte.weight"][chunk]), 1)

    def bidirectional(query, key, value):
        return F.scaled_dot_product_attention(query, key, value)

    x = _stack(state, "f.", x, torch.arange(x.shape[1]), heads, bidirectional)
    x = x[:, len(prefix) :].flatten(1)
    weight = state["f.proj_fx.weight"]
    if power is not None:
        size = (weight.shape[0], x.shape[1])
        weight = F.interpolate(weight[None, None], size=size, mode="bilinear")[0, 0]
    return F.linear(x, weight)


def forward(state, tokens, *, chunk_size, heads, compressor_heads, attend=dense_attend) -> Tensor:
    """Logits ``(B, N, V)``; index t is the distribution of token t + 1. N is whole chunks."""
    adaptive = "seperator.weight" in state
    power = int(math.log2(chunk_size)) if adaptive else None
    batch, length = tokens.shape
    chunks = tokens.view(batch, length // chunk_size, chunk_size).unbind(1)
    vectors = [state["dummy_fx.weight"][power or 0].expand(batch, -1)]
    vectors += [
        _compress(state, chunk, n, power, compressor_heads) for n, chunk in enumerate(chunks)
    ]
    rows, predicts = [], []
    for n, vector in enumerate(vectors):
        rows.append(vector.unsqueeze(1))
        if adaptive:
            rows.append(state["seperator.weight"].expand(batch, 1, -1))
        lead = 2 if adaptive else 1
        if n < len(chunks):
            rows.append(state["wte.weight"][chunks[n]])
        # The last row before a chunk predicts its first token, each token but the last the next.
        start = n * (lead + chunk_size) + lead - 1
        predicts += range(start, start + (chunk_size if n < len(chunks) else 1))
    x = torch.cat(rows, 1)
    block = lead + chunk_size
    positions = torch.arange(x.shape[1]) % block
    x = _stack(state, "", x, positions, heads, lambda q, k, v: attend(q, k, v, block_size=block))
    return F.linear(x[:, predicts[1:]], state["output.weight"])

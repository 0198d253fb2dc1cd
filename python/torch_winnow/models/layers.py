"""The transformer that every model here is made of: RMSNorm, rotary positions, SwiGLU.

One stack serves the causal decoders, the compressor and the diffusion model. They differ only in
the function that attends, so it is handed in: training, prefill and decoding against pages are one
code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_winnow._arguments import integer

__all__ = ["Attend", "Norm", "Rotary", "Stack", "StackConfig", "attend_dense", "check_tokens"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer, query (B, Hq, N, D), key (B, Hkv, N, D), value) -> (B, Hq, N, D)``."""


@dataclass(frozen=True)
class StackConfig:
    """Shape of a stack of transformer layers.

    Attributes:
        width: features per row.
        depth: number of layers.
        heads: query heads; ``width`` must be a multiple, and the head dimension even (rotary).
        kv_heads: key/value heads, a divisor of ``heads``; None for as many.
        hidden: inner features of the SwiGLU; None for 8/3 of the width, rounded up to 64.
        rotary_base: base of the rotary frequencies.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int | None = None
    hidden: int | None = None
    rotary_base: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads"):
            integer(name, getattr(self, name), 1)
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(
                f"heads: expected a divisor of width={self.width} that leaves an even head "
                f"dimension, got {self.heads}"
            )
        if self.key_value_heads < 1 or self.heads % self.key_value_heads:
            raise ValueError(
                f"kv_heads: expected a divisor of heads={self.heads}, got {self.kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        """``kv_heads``, or ``heads`` where that is None."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def inner(self) -> int:
        """Inner features of the SwiGLU, as given or by rule."""
        return self.hidden or 64 * math.ceil(8 * self.width / 3 / 64)


class Norm(nn.RMSNorm):
    """RMSNorm whose scale follows the rows' dtype: mixed dtypes miss the fused kernel."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Rotary(nn.Module):
    """Rotary position tables (Su et al., 2021, halves rotated), kept for ``positions`` rows."""

    cos: Tensor
    sin: Tensor

    def __init__(self, positions: int, head_dim: int, base: float) -> None:
        super().__init__()
        frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
        # (positions, 1, 2, D/2): both halves of a head, ready to broadcast over (B, N, H, 2, D/2).
        cos = torch.stack((angle.cos(), angle.cos()), 1).unsqueeze(1)
        sin = torch.stack((-angle.sin(), angle.sin()), 1).unsqueeze(1)
        self.register_buffer("cos", cos.float(), persistent=False)
        self.register_buffer("sin", sin.float(), persistent=False)

    def forward(self, positions: Tensor | slice) -> tuple[Tensor, Tensor]:
        return self.cos[positions], self.sin[positions]


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    if cos.dtype != x.dtype:  # autocast: a float32 table would promote the whole product
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    batch, rows, heads, head_dim = x.shape
    halves = x.view(batch, rows, heads, 2, head_dim // 2)
    return torch.addcmul(halves * cos, halves.flip(3), sin).view(batch, rows, heads, head_dim)


class _Layer(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.key_value_heads
        self.all_heads, self.head_dim = self.heads + 2 * self.kv_heads, config.head_dim
        self.attention_norm = Norm(config.width)
        self.mlp_norm = Norm(config.width)
        # Fused projections: decoding a token is bound by the number of calls, not by their size.
        self.qkv = nn.Linear(config.width, self.all_heads * self.head_dim, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.gate_up = nn.Linear(config.width, 2 * config.inner, bias=False)
        self.down = nn.Linear(config.inner, config.width, bias=False)

    def forward(
        self, index: int, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        batch, rows, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, rows, self.all_heads, self.head_dim)
        rotated = _rotate(qkv[:, :, : self.heads + self.kv_heads], rotary).transpose(1, 2)
        query, key = rotated[:, : self.heads], rotated[:, self.heads :]
        value = qkv[:, :, self.heads + self.kv_heads :].transpose(1, 2)
        attended = attend(index, query, key, value).transpose(1, 2).reshape(batch, rows, width)
        x = x + self.out(attended)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Layers and the final norm: ``(B, N, width)`` in, ``(B, N, width)`` out.

    ``positions`` bounds the rotary table.
    """

    def __init__(self, config: StackConfig, positions: int) -> None:
        super().__init__()
        self.config = config
        self.rotary = Rotary(positions, config.head_dim, config.rotary_base)
        layers = [_Layer(config) for _ in range(config.depth)]
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(config.width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for layer in layers:  # a layer starts as the identity
            nn.init.zeros_(layer.out.weight)
            nn.init.zeros_(layer.down.weight)

    def forward(self, x: Tensor, positions: Tensor | slice, attend: Attend) -> Tensor:
        """``positions`` are those of the N rows, for the rotary table."""
        rotary = self.rotary(positions)
        for index, layer in enumerate(self.layers):
            x = layer(index, x, rotary, attend)
        return self.norm(x)  # type: ignore[no-any-return]


def attend_dense(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Attention to all rows, or to those so far."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)


def check_tokens(tokens: Tensor, vocab_size: int, max_tokens: int, name: str = "tokens") -> Tensor:
    """``(B, N)`` integer ids as int64, or a ``ValueError`` that says what is wrong.

    The range is checked on the CPU only: elsewhere it would wait for the device.
    """
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(
            f"{name}: expected (B, N) integer token ids, got {tuple(tokens.shape)} {tokens.dtype}"
        )
    if tokens.shape[1] > max_tokens:
        raise ValueError(f"{name}: expected at most max_tokens={max_tokens}, got {tokens.shape[1]}")
    tokens = tokens.long()
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name}: expected ids in [0, {vocab_size}), got values from {low} to {high}"
            )
    return tokens

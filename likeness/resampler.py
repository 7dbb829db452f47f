"""The perceiver resampler shared by the adapters: learned latents attend to features (Flamingo 2204.14198, Fig. 5).

IP-Adapter Plus, FaceID-Plus, InstantID and PuLID use this form: the keys are [features, latents], two LayerNorms in
front, a feed-forward without biases behind, no position embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

HEAD_WIDTH = 64

Shapes = Mapping[str, tuple[int, ...]]


def depth_of(shapes: Shapes) -> int:
    """The number of layers named in a perceiver's state dict."""
    return len({key.split(".")[1] for key in shapes if key.startswith("layers.")})


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention of so many heads on [B, ., heads * head_width], the softmax in float32."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, heads, ., head_width]
    scale = q.shape[-1] ** -0.25  # on either side, so that half precision does not overflow in the product
    attention = ((q * scale) @ (k * scale).transpose(-2, -1)).float().softmax(dim=-1).to(v.dtype)
    return (attention @ v).transpose(1, 2).flatten(2)


class PerceiverAttention(nn.Module):
    """Latents [B, T, dim] attend to [features, latents] of [B, L + T, dim]."""

    def __init__(self, dim: int, heads: int, head_width: int, operations: Any) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.norm1 = operations.LayerNorm(dim)
        self.norm2 = operations.LayerNorm(dim)
        self.to_q = operations.Linear(dim, inner, bias=False)
        self.to_kv = operations.Linear(dim, inner * 2, bias=False)
        self.to_out = operations.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat((x, latents), dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents), k, v, self.heads))


def feed_forward(dim: int, operations: Any, ratio: int = 4) -> nn.Sequential:
    inner = dim * ratio
    return nn.Sequential(
        operations.LayerNorm(dim),
        operations.Linear(dim, inner, bias=False),
        nn.GELU(),
        operations.Linear(inner, dim, bias=False),
    )


def layers_of(dim: int, depth: int, heads: int, head_width: int, operations: Any, ratio: int = 4) -> nn.ModuleList:
    """So many perceiver layers, an attention and a feed-forward each."""
    return nn.ModuleList(
        nn.ModuleList((PerceiverAttention(dim, heads, head_width, operations), feed_forward(dim, operations, ratio)))
        for _ in range(depth)
    )


def refine(layers: Iterable[nn.Module], latents: Tensor, x: Tensor) -> Tensor:
    """Latents [B, T, dim] through perceiver layers that read x [B, L, dim]."""
    for attention, feed in layers:  # pyright: ignore[reportGeneralTypeIssues]
        latents = attention(x, latents) + latents
        latents = feed(latents) + latents
    return latents


class Perceiver(nn.Module):
    """Refines given latents [B, T, dim] by features [B, L, features] into [B, T, out]."""

    head_width = HEAD_WIDTH  # of every released file; no shape tells it

    def __init__(self, dim: int, depth: int, heads: int, features: int, out: int, operations: Any) -> None:
        super().__init__()
        self.proj_in = operations.Linear(features, dim)
        self.proj_out = operations.Linear(dim, out)
        self.norm_out = operations.LayerNorm(out)
        self.layers = layers_of(dim, depth, heads, self.head_width, operations)

    @classmethod
    def from_shapes(cls, shapes: Shapes, operations: Any) -> Perceiver:
        """The module whose state dict has these shapes."""
        dim, features = shapes["proj_in.weight"]
        heads = shapes["layers.0.0.to_q.weight"][0] // cls.head_width
        return cls(dim, depth_of(shapes), heads, features, shapes["proj_out.weight"][0], operations)

    def refine(self, latents: Tensor, features: Tensor) -> Tensor:
        return self.norm_out(self.proj_out(refine(self.layers, latents, self.proj_in(features))))

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        return self.refine(latents, features)


class Resampler(Perceiver):
    """A perceiver with learned latents: features [B, L, features] become [B, tokens, out]."""

    def __init__(self, dim: int, depth: int, heads: int, tokens: int, features: int, out: int, operations: Any) -> None:
        super().__init__(dim, depth, heads, features, out, operations)
        self.latents = nn.Parameter(torch.empty(1, tokens, dim))

    @classmethod
    def from_shapes(cls, shapes: Shapes, operations: Any) -> Resampler:
        _, tokens, dim = shapes["latents"]
        heads = shapes["layers.0.0.to_q.weight"][0] // cls.head_width
        features, out = shapes["proj_in.weight"][1], shapes["proj_out.weight"][0]
        return cls(dim, depth_of(shapes), heads, tokens, features, out, operations)

    def forward(self, features: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.refine(self.latents.to(features).expand(features.shape[0], -1, -1), features)

"""The perceiver resampler of several adapters: learned latents attend to features (Flamingo 2204.14198, Fig. 5).

IP-Adapter Plus, FaceID-Plus, InstantID and PuLID use this form: keys of [features, latents], a LayerNorm on each of the
two, a feed-forward without biases, no position embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PERCEIVER_HEAD_DIM = 64

TensorShapes = Mapping[str, tuple[int, ...]]


def count_layers(shapes: TensorShapes) -> int:
    """The number of layers in a perceiver's state dict."""
    return len({key.split(".")[1] for key in shapes if key.startswith("layers.")})


def count_heads(shapes: TensorShapes, head_dim: int) -> int:
    """The number of heads in a perceiver's state dict. Raises ValueError where the queries are not whole heads."""
    rows = shapes["layers.0.0.to_q.weight"][0]
    if rows % head_dim or not rows:
        raise ValueError(f"queries of {rows} channels, expected a multiple of {head_dim}, the size of a head")
    return rows // head_dim


def get_inner_width(shapes: TensorShapes) -> int:
    """The hidden width of the feed-forwards in a perceiver's state dict."""
    return shapes["layers.0.1.1.weight"][0]


def compute_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention on [B, ., num_heads * head_dim], with the softmax in float32."""
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, heads, ., head_dim]
    scale = q.shape[-1] ** -0.25  # on both factors, so that their product does not overflow in half precision
    attention = ((q * scale) @ (k * scale).transpose(-2, -1)).float().softmax(dim=-1).to(v.dtype)
    return (attention @ v).transpose(1, 2).flatten(2)


class PerceiverAttention(nn.Module):
    """Latents [B, T, dim] attend to [features, latents] of [B, L + T, dim]."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, operations: Any) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.norm1 = operations.LayerNorm(dim)
        self.norm2 = operations.LayerNorm(dim)
        self.to_q = operations.Linear(dim, inner, bias=False)
        self.to_kv = operations.Linear(dim, inner * 2, bias=False)
        self.to_out = operations.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat((x, latents), dim=1)).chunk(2, dim=-1)
        return self.to_out(compute_attention(self.to_q(latents), k, v, self.num_heads))


def build_feed_forward(dim: int, inner: int, operations: Any) -> nn.Sequential:
    return nn.Sequential(
        operations.LayerNorm(dim),
        operations.Linear(dim, inner, bias=False),
        nn.GELU(),
        operations.Linear(inner, dim, bias=False),
    )


def build_perceiver_layers(
    dim: int, depth: int, num_heads: int, head_dim: int, inner: int, operations: Any
) -> nn.ModuleList:
    """`depth` perceiver layers, each an attention and a feed-forward with `inner` hidden channels."""
    return nn.ModuleList(
        nn.ModuleList(
            (PerceiverAttention(dim, num_heads, head_dim, operations), build_feed_forward(dim, inner, operations))
        )
        for _ in range(depth)
    )


def refine_latents(layers: Iterable[nn.Module], latents: Tensor, x: Tensor) -> Tensor:
    """Run latents [B, T, dim] through perceiver layers that read x [B, L, dim]."""
    for attention, feed_forward in layers:  # pyright: ignore[reportGeneralTypeIssues]
        latents = attention(x, latents) + latents
        latents = feed_forward(latents) + latents
    return latents


class Perceiver(nn.Module):
    """Refines given latents [B, T, dim] by features [B, L, features] into [B, T, out].

    `inner` is the hidden width of the feed-forwards, as published 4 * dim by default.
    """

    head_dim = PERCEIVER_HEAD_DIM  # of every published file; the shapes do not determine it

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        in_features: int,
        out_features: int,
        operations: Any,
        inner: int | None = None,
    ) -> None:
        super().__init__()
        self.proj_in = operations.Linear(in_features, dim)
        self.proj_out = operations.Linear(dim, out_features)
        self.norm_out = operations.LayerNorm(out_features)
        self.layers = build_perceiver_layers(dim, depth, num_heads, self.head_dim, inner or 4 * dim, operations)

    @classmethod
    def from_shapes(cls, shapes: TensorShapes, operations: Any) -> Perceiver:
        """The module whose state dict has these shapes."""
        dim, features = shapes["proj_in.weight"]
        heads, out = count_heads(shapes, cls.head_dim), shapes["proj_out.weight"][0]
        return cls(dim, count_layers(shapes), heads, features, out, operations, get_inner_width(shapes))

    def refine(self, latents: Tensor, features: Tensor) -> Tensor:
        return self.norm_out(self.proj_out(refine_latents(self.layers, latents, self.proj_in(features))))

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        return self.refine(latents, features)


class Resampler(Perceiver):
    """A perceiver with learned latents: features [B, L, features] become [B, tokens, out]."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        num_tokens: int,
        in_features: int,
        out_features: int,
        operations: Any,
        inner: int | None = None,
    ) -> None:
        super().__init__(dim, depth, num_heads, in_features, out_features, operations, inner)
        self.latents = nn.Parameter(torch.empty(1, num_tokens, dim))

    @classmethod
    def from_shapes(cls, shapes: TensorShapes, operations: Any) -> Resampler:
        _, tokens, dim = shapes["latents"]
        heads, inner = count_heads(shapes, cls.head_dim), get_inner_width(shapes)
        features, out = shapes["proj_in.weight"][1], shapes["proj_out.weight"][0]
        return cls(dim, count_layers(shapes), heads, tokens, features, out, operations, inner)

    def forward(self, features: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.refine(self.latents.to(features).expand(features.shape[0], -1, -1), features)

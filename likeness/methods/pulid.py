"""PuLID (arXiv 2404.16022): identity tokens from a face embedding and five ViT levels, orthogonal to the prompt.

    id = [ArcFace embedding 512, EVA-CLIP embedding 768 at unit length]
    v1: ID encoder, 10 tokens; v1.1 and FLUX: IDFormer, 32 tokens.

On SDXL a second cross-attention reads the tokens, and part of its output is added to the text's (PULID_MODES); on FLUX
additional cross-attentions follow every few blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from .resampler import (
    PERCEIVER_HEAD_DIM,
    TensorShapes,
    build_perceiver_layers,
    compute_attention,
    count_heads,
    count_layers,
    get_inner_width,
    refine_latents,
)

NUM_VIT_LEVELS = 5  # hidden states of the ViT
NUM_ID_TOKENS = 5  # of v1 per id vector; ortho_v2's m counts as many first tokens


def _build_mapping(shapes: TensorShapes, name: str, operations: Any) -> nn.Sequential:
    """Linear, LayerNorm, LeakyReLU twice, and Linear: [., features] -> [., out]."""
    (inner, features), (out, _) = shapes[f"{name}.0.weight"], shapes[f"{name}.6.weight"]
    return nn.Sequential(
        operations.Linear(features, inner),
        operations.LayerNorm(inner),
        nn.LeakyReLU(),
        operations.Linear(inner, inner),
        operations.LayerNorm(inner),
        nn.LeakyReLU(),
        operations.Linear(inner, out),
    )


def make_id_vector(face: Tensor, pooled: Tensor) -> Tensor:
    """id: raw ArcFace embedding [..., 512] and EVA-CLIP embedding [..., 768] -> [..., 1280]."""
    return torch.cat((face, normalize(pooled, dim=-1)), dim=-1)


class IDEncoder(nn.Module):
    """PuLID v1: face [B, n, 512], pooled [B, n, 768] and levels [B, n, 5, L, W] of n photos -> [B, 5 + 5 * n, width].

    Five tokens come from the id vector, and one from each level: its class token's plus the mean of its patches'. Of
    further photos only the id vector's tokens are used.
    """

    def __init__(self, shapes: TensorShapes, operations: Any) -> None:
        super().__init__()
        self.body = _build_mapping(shapes, "body", operations)
        for i in range(NUM_VIT_LEVELS):
            for name in (f"mapping_{i}", f"mapping_patch_{i}"):
                self.add_module(name, _build_mapping(shapes, name, operations))

    def forward(self, face: Tensor, pooled: Tensor, levels: Tensor) -> Tensor:
        tokens = self.body(make_id_vector(face, pooled)).unflatten(-1, (NUM_ID_TOKENS, -1))  # [B, n, 5, width]
        level_tokens = [
            self.get_submodule(f"mapping_{i}")(level[:, :1])
            + self.get_submodule(f"mapping_patch_{i}")(level[:, 1:]).mean(dim=1, keepdim=True)
            for i, level in enumerate(levels[:, 0].unbind(1))
        ]
        return torch.cat((tokens[:, 0], *level_tokens, tokens[:, 1:].flatten(1, 2)), dim=1)


class IDFormer(nn.Module):
    """PuLID v1.1 and FLUX: face [B, n, 512], pooled [B, n, 768] and levels [B, n, 5, L, W] -> [B, queries, out].

    A perceiver whose latents are learned queries and the tokens of the id vectors. An equal share of its layers reads
    each level, appended to the tokens of the id vectors. Several photos make one sequence.
    """

    def __init__(self, shapes: TensorShapes, operations: Any, head_dim: int = PERCEIVER_HEAD_DIM) -> None:
        super().__init__()
        (_, queries, dim), (_, out) = shapes["latents"], shapes["proj_out"]
        heads, inner = count_heads(shapes, head_dim), get_inner_width(shapes)
        depth = count_layers(shapes)
        if depth % NUM_VIT_LEVELS:
            raise ValueError(f"{depth} layers, expected a multiple of {NUM_VIT_LEVELS}")
        self.latents = nn.Parameter(torch.empty(1, queries, dim))
        self.proj_out = nn.Parameter(torch.empty(dim, out))
        self.layers = build_perceiver_layers(dim, depth, heads, head_dim, inner, operations)
        self.id_embedding_mapping = _build_mapping(shapes, "id_embedding_mapping", operations)
        for i in range(NUM_VIT_LEVELS):
            self.add_module(f"mapping_{i}", _build_mapping(shapes, f"mapping_{i}", operations))

    def forward(self, face: Tensor, pooled: Tensor, levels: Tensor) -> Tensor:
        dim, queries = self.latents.shape[-1], self.latents.shape[1]
        identity = self.id_embedding_mapping(make_id_vector(face, pooled)).unflatten(-1, (-1, dim)).flatten(1, 2)
        latents = torch.cat((self.latents.to(identity).expand(len(identity), -1, -1), identity), dim=1)
        layers_per_level = len(self.layers) // NUM_VIT_LEVELS
        for i, level in enumerate(levels.unbind(2)):  # [B, n, L, W]
            x = torch.cat((identity, self.get_submodule(f"mapping_{i}")(level.flatten(1, 2))), dim=1)
            latents = refine_latents(self.layers[i * layers_per_level : (i + 1) * layers_per_level], latents, x)
        return latents[:, :queries] @ self.proj_out.to(latents)


# What is added to the text attention's output o [B, N, C], from the identity attention's output i, already scaled by
# the strength. q [B, N, C] and k [B, T, C] are the identity attention's; the last argument is its number of heads.
OrthogonalizeFunction = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def _project_onto(o: Tensor, i: Tensor) -> Tensor:
    """P: the projection of i onto o, channel by channel over all positions, in float32."""
    o, i = o.float(), i.float()
    square = (o * o).sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)  # a channel may be all zeros
    return o * ((o * i).sum(dim=1, keepdim=True) / square)


def _keep_identity_attention(o: Tensor, i: Tensor, q: Tensor, k: Tensor, heads: int) -> Tensor:
    return i


def _orthogonalize(o: Tensor, i: Tensor, q: Tensor, k: Tensor, heads: int) -> Tensor:
    return (i - _project_onto(o, i)).to(i.dtype)


def _orthogonalize_v2(o: Tensor, i: Tensor, q: Tensor, k: Tensor, heads: int) -> Tensor:
    """i + (m - 1) * P: P is kept where a position attends to the id vector's tokens, by m [B, N, 1]."""
    q, k = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
    attention = (q @ k.transpose(-2, -1)).softmax(dim=-1)  # as published, without the usual scale by head_dim ** -0.5
    m = attention[..., :NUM_ID_TOKENS].sum(dim=-1).mean(dim=1)[..., None]
    return (i + (m - 1) * _project_onto(o, i)).to(i.dtype)


@dataclass(frozen=True)
class PuLIDMode:
    """How identity attention joins the text's: zero tokens appended to the identity's, which absorb attention, and the
    part of the output that is added."""

    num_zero_tokens: int
    orthogonalize: OrthogonalizeFunction

    def append_zero_tokens(self, tokens: Tensor) -> Tensor:
        """Keys or values [n, T, C] with those of the zero tokens, which are 0."""
        return pad(tokens, (0, 0, 0, self.num_zero_tokens))


PLAIN_MODE = PuLIDMode(0, _keep_identity_attention)

# The settings of the official apps, by the names that users know.
PULID_MODES: Mapping[str, PuLIDMode] = {
    "fidelity": PuLIDMode(8, _orthogonalize_v2),
    "style": PuLIDMode(16, _orthogonalize),
    "v1.1": PuLIDMode(20, _orthogonalize_v2),
    "plain": PLAIN_MODE,
}
AUTO_MODE = "auto"
DEFAULT_MODES: Mapping[str, str] = {"pulid": "fidelity", "pulid_v1_1": "v1.1"}  # by the adapter's kind


def select_mode(kind: str, mode_name: str = AUTO_MODE) -> PuLIDMode:
    """The mode of an adapter. Kinds other than PuLID's for SDXL only have the plain one."""
    default = DEFAULT_MODES.get(kind)
    return PLAIN_MODE if default is None else PULID_MODES[default if mode_name == AUTO_MODE else mode_name]


class PuLIDFluxAttention(nn.Module):
    """PuLID-FLUX's cross-attention after a block: image tokens [B, N, dim] read identity tokens.

    `forward` makes keys and values [B, T, num_heads * head_dim] of tokens [B, T, width], the same at every step.
    """

    def __init__(self, width: int, dim: int, operations: Any, num_heads: int = 16, head_dim: int = 128) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.norm1 = operations.LayerNorm(width)
        self.norm2 = operations.LayerNorm(dim)
        self.to_q = operations.Linear(dim, inner, bias=False)
        self.to_kv = operations.Linear(width, inner * 2, bias=False)
        self.to_out = operations.Linear(inner, dim, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.to_kv(self.norm1(tokens)).chunk(2, dim=-1)
        return k, v

    def attend_identity(self, image_tokens: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What is added to the image tokens after the block: [B, N, dim]."""
        return self.to_out(compute_attention(self.to_q(self.norm2(image_tokens)), k, v, self.num_heads))

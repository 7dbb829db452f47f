"""PuLID (arXiv 2404.16022): identity tokens from a face vector and five ViT levels, kept off what the prompt says.

    id = [ArcFace vector 512, EVA-CLIP's embedding 768 at unit length]
    v1: ID encoder, 10 tokens; v1.1 and FLUX: IDFormer, 32 tokens.

On SDXL a second cross-attention reads the tokens, and only a part of its result is added to the text's (`MODES`); on
FLUX cross-attentions of their own follow every few blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from .resampler import HEAD_WIDTH, Shapes, attend, depth_of, layers_of, refine

LEVELS = 5  # of the ViT's hidden states
IDENTITY_TOKENS = 5  # that v1 makes of an id vector; of the first tokens, those that ortho_v2's m counts


def _mapping_of(shapes: Shapes, name: str, operations: Any) -> nn.Sequential:
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


def id_vector(face: Tensor, pooled: Tensor) -> Tensor:
    """ArcFace's raw vector [..., 512] and EVA-CLIP's embedding [..., 768] -> [..., 1280]."""
    return torch.cat((face, normalize(pooled, dim=-1)), dim=-1)


class IDEncoder(nn.Module):
    """PuLID v1: face [B, n, 512], pooled [B, n, 768] and levels [B, n, 5, L, W] of n photos -> [B, 5 + 5 * n, width].

    Five tokens are of the id vector, one of each level: its class token's, plus the mean of its patches'. Of photos
    behind the first, only the id vector's tokens are read.
    """

    def __init__(self, shapes: Shapes, operations: Any) -> None:
        super().__init__()
        self.body = _mapping_of(shapes, "body", operations)
        for i in range(LEVELS):
            for name in (f"mapping_{i}", f"mapping_patch_{i}"):
                self.add_module(name, _mapping_of(shapes, name, operations))

    def forward(self, face: Tensor, pooled: Tensor, levels: Tensor) -> Tensor:
        tokens = self.body(id_vector(face, pooled)).unflatten(-1, (IDENTITY_TOKENS, -1))  # [B, n, 5, width]
        seen = [
            self.get_submodule(f"mapping_{i}")(level[:, :1])
            + self.get_submodule(f"mapping_patch_{i}")(level[:, 1:]).mean(dim=1, keepdim=True)
            for i, level in enumerate(levels[:, 0].unbind(1))
        ]
        return torch.cat((tokens[:, 0], *seen, tokens[:, 1:].flatten(1, 2)), dim=1)


class IDFormer(nn.Module):
    """PuLID v1.1 and FLUX: face [B, n, 512], pooled [B, n, 768] and levels [B, n, 5, L, W] -> [B, queries, out].

    A perceiver whose latents are learned ones and the id vectors' tokens. An equal share of its layers reads each
    level, behind the id vectors' tokens again. Several photos make one sequence.
    """

    def __init__(self, shapes: Shapes, operations: Any, head_width: int = HEAD_WIDTH) -> None:
        super().__init__()
        (_, queries, dim), (_, out) = shapes["latents"], shapes["proj_out"]
        heads, ratio = shapes["layers.0.0.to_q.weight"][0] // head_width, shapes["layers.0.1.1.weight"][0] // dim
        depth = depth_of(shapes)
        if depth % LEVELS:
            raise ValueError(f"{depth} layers, not as many for each of {LEVELS} levels")
        self.latents = nn.Parameter(torch.empty(1, queries, dim))
        self.proj_out = nn.Parameter(torch.empty(dim, out))
        self.layers = layers_of(dim, depth, heads, head_width, operations, ratio)
        self.id_embedding_mapping = _mapping_of(shapes, "id_embedding_mapping", operations)
        for i in range(LEVELS):
            self.add_module(f"mapping_{i}", _mapping_of(shapes, f"mapping_{i}", operations))

    def forward(self, face: Tensor, pooled: Tensor, levels: Tensor) -> Tensor:
        dim, queries = self.latents.shape[-1], self.latents.shape[1]
        identity = self.id_embedding_mapping(id_vector(face, pooled)).unflatten(-1, (-1, dim)).flatten(1, 2)
        latents = torch.cat((self.latents.to(identity).expand(len(identity), -1, -1), identity), dim=1)
        each = len(self.layers) // LEVELS
        for i, level in enumerate(levels.unbind(2)):  # [B, n, L, W]
            x = torch.cat((identity, self.get_submodule(f"mapping_{i}")(level.flatten(1, 2))), dim=1)
            latents = refine(self.layers[i * each : (i + 1) * each], latents, x)
        return latents[:, :queries] @ self.proj_out.to(latents)


# What is added to the text attention's result o [B, N, C], of the identity attention's i, which is already scaled by
# the strength; q [B, N, C] and k [B, T, C] are the identity attention's, of so many heads.
Mix = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def _along(o: Tensor, i: Tensor) -> Tensor:
    """P: the part of i along o, channel by channel over all positions, in float32."""
    o, i = o.float(), i.float()
    square = (o * o).sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)  # a channel may be all 0
    return o * ((o * i).sum(dim=1, keepdim=True) / square)


def _plain(o: Tensor, i: Tensor, q: Tensor, k: Tensor, heads: int) -> Tensor:
    return i


def _ortho(o: Tensor, i: Tensor, q: Tensor, k: Tensor, heads: int) -> Tensor:
    return (i - _along(o, i)).to(i.dtype)


def _ortho_v2(o: Tensor, i: Tensor, q: Tensor, k: Tensor, heads: int) -> Tensor:
    """P counts where a position attends to the id vector's tokens: i + (m - 1) * P, m [B, N, 1]."""
    q, k = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
    attention = (q @ k.transpose(-2, -1)).softmax(dim=-1)  # as published, not divided by the root of the head's width
    m = attention[..., :IDENTITY_TOKENS].sum(dim=-1).mean(dim=1)[..., None]
    return (i + (m - 1) * _along(o, i)).to(i.dtype)


@dataclass(frozen=True)
class Mode:
    """How identity attention joins the text's: `zeros` empty tokens behind the identity's, which drain attention, and
    what of the result is added."""

    zeros: int
    mix: Mix

    def drained(self, tokens: Tensor) -> Tensor:
        """Keys or values [n, T, C] with those of the empty tokens, which are 0."""
        return pad(tokens, (0, 0, 0, self.zeros))


PLAIN = Mode(0, _plain)

# The official apps' settings, by the names that users know.
MODES: Mapping[str, Mode] = {
    "fidelity": Mode(8, _ortho_v2),
    "style": Mode(16, _ortho),
    "v1.1": Mode(20, _ortho_v2),
    "plain": PLAIN,
}
AUTO = "auto"
DEFAULTS: Mapping[str, str] = {"pulid": "fidelity", "pulid_v1_1": "v1.1"}  # by the adapter's kind


def mode_of(kind: str, choice: str = AUTO) -> Mode:
    """The mode of an adapter. Kinds other than PuLID's for SDXL know only the plain one."""
    default = DEFAULTS.get(kind)
    return PLAIN if default is None else MODES[default if choice == AUTO else choice]


class FluxAttention(nn.Module):
    """PuLID-FLUX's cross-attention, which follows a block: picture tokens [B, N, dim] read identity tokens.

    Its forward makes keys and values [B, T, heads * head_width] of tokens [B, T, width], the same at every step.
    """

    def __init__(self, width: int, dim: int, operations: Any, heads: int = 16, head_width: int = 128) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.norm1 = operations.LayerNorm(width)
        self.norm2 = operations.LayerNorm(dim)
        self.to_q = operations.Linear(dim, inner, bias=False)
        self.to_kv = operations.Linear(width, inner * 2, bias=False)
        self.to_out = operations.Linear(inner, dim, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.to_kv(self.norm1(tokens)).chunk(2, dim=-1)
        return k, v

    def read(self, image: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What is added to the picture tokens behind the block: [B, N, dim]."""
        return self.to_out(attend(self.to_q(self.norm2(image)), k, v, self.heads))

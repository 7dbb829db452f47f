"""Projectors of the IP-Adapter family (arXiv 2308.06721, Sec. 3.2.1): an identity's embeddings become tokens.

In the adapters' files their tensors have the prefix `image_proj.` or the like (key_maps.IP_ADAPTER). The resampler of
IP-Adapter Plus, InstantID and PuLID is in resampler, PuLID's encoders are in pulid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .resampler import Perceiver, TensorShapes


class ImageProjection(nn.Module):
    """IP-Adapter: pooled CLIP embedding [n, E] -> [n, tokens, width]."""

    def __init__(self, in_features: int, num_tokens: int, width: int, operations: Any) -> None:
        super().__init__()
        self.proj = operations.Linear(in_features, num_tokens * width)
        self.norm = operations.LayerNorm(width)
        self.width = width

    @classmethod
    def from_shapes(cls, shapes: TensorShapes, operations: Any) -> ImageProjection:
        (rows, features), (width,) = shapes["proj.weight"], shapes["norm.weight"]
        return cls(features, rows // width, width, operations)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.norm(self.proj(embedding).unflatten(-1, (-1, self.width)))


class FullFaceProjection(nn.Module):
    """IP-Adapter Full-Face: CLIP hidden states [n, 257, E] -> [n, 257, width], position by position."""

    def __init__(self, in_features: int, width: int, operations: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            operations.Linear(in_features, in_features),
            nn.GELU(),
            operations.Linear(in_features, width),
            operations.LayerNorm(width),
        )

    @classmethod
    def from_shapes(cls, shapes: TensorShapes, operations: Any) -> FullFaceProjection:
        return cls(shapes["proj.0.weight"][1], shapes["proj.2.weight"][0], operations)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.proj(hidden)


class FaceIDProjection(nn.Module):
    """FaceID, Portrait: ArcFace unit embedding [n, 512] -> [n, tokens, width]."""

    def __init__(self, in_features: int, inner: int, num_tokens: int, width: int, operations: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            operations.Linear(in_features, inner), nn.GELU(), operations.Linear(inner, num_tokens * width)
        )
        self.norm = operations.LayerNorm(width)
        self.width = width

    @classmethod
    def from_shapes(cls, shapes: TensorShapes, operations: Any) -> FaceIDProjection:
        (inner, features), (rows, _), (width,) = (shapes[k] for k in ("proj.0.weight", "proj.2.weight", "norm.weight"))
        return cls(features, inner, rows // width, width, operations)

    def forward(self, face: Tensor) -> Tensor:
        return self.norm(self.proj(face).unflatten(-1, (-1, self.width)))


class FaceIDPlusProjection(FaceIDProjection):
    """FaceID-Plus: ArcFace unit embedding [n, 512] and CLIP hidden states [n, 257, 1280] -> [n, tokens, width].

    x are the face tokens, y the output of a perceiver with latents x that reads the hidden states. Plus returns y
    (`shortcut` None); PlusV2, which has the same tensors, returns x + `shortcut` * y.
    """

    def __init__(
        self, in_features: int, inner: int, num_tokens: int, width: int, operations: Any, perceiver: Perceiver
    ) -> None:
        super().__init__(in_features, inner, num_tokens, width, operations)
        self.perceiver_resampler = perceiver

    @classmethod
    def from_shapes(cls, shapes: TensorShapes, operations: Any) -> FaceIDPlusProjection:
        prefix = "perceiver_resampler."
        perceiver = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        (inner, features), (rows, _), (width,) = (shapes[k] for k in ("proj.0.weight", "proj.2.weight", "norm.weight"))
        return cls(features, inner, rows // width, width, operations, Perceiver.from_shapes(perceiver, operations))

    def forward(self, face: Tensor, hidden: Tensor, shortcut: float | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = super().forward(face)
        y = self.perceiver_resampler(x, hidden)
        return y if shortcut is None else x + shortcut * y


class InfiniteIDProjection(nn.Module):
    """Infinite-ID's M_clip and M_face: ArcFace unit embedding [n, 512], CLIP's last states [n, 257, 1280] -> c_id.

    c_id [n, 257 + tokens, width]: the projected CLIP states, then the face tokens.
    """

    def __init__(self, hidden: int, width: int, face: FaceIDProjection, operations: Any) -> None:
        super().__init__()
        self.clip = nn.Sequential(operations.LayerNorm(hidden), operations.Linear(hidden, width))
        self.face = face

    @classmethod
    def from_shapes(cls, shapes: TensorShapes, operations: Any) -> InfiniteIDProjection:
        width, hidden = shapes["clip.1.weight"]
        face = {key.removeprefix("face."): shape for key, shape in shapes.items() if key.startswith("face.")}
        return cls(hidden, width, FaceIDProjection.from_shapes(face, operations), operations)

    def forward(self, face: Tensor, hidden: Tensor) -> Tensor:
        return torch.cat((self.clip(hidden), self.face(face)), dim=1)


class OmniIDProjection(nn.Module):
    """Omni-ID tokens [n, T, E] -> [n, T, width]. Adapters without a projector read the tokens directly."""

    def __init__(self, in_features: int, width: int, operations: Any) -> None:
        super().__init__()
        self.proj = operations.Linear(in_features, width)
        self.norm = operations.LayerNorm(width)

    @classmethod
    def from_shapes(cls, shapes: TensorShapes, operations: Any) -> nn.Module:
        if not shapes:
            return nn.Identity()
        width, features = shapes["proj.weight"]
        return cls(features, width, operations)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.proj(tokens))

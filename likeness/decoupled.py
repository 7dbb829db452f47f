"""IP-Adapter (arXiv 2308.06721), FaceID, Portrait, InstantID (2401.07519), PuLID: a second, decoupled cross-attention.

    Z = Attention(Q, K, V) + strength * Attention(Q, K', V'),   K' = t W'_k,  V' = t W'_v         (Eq. 5)

Here are the projectors, which make the tokens t of an identity's embeddings, and whole adapters. In FLUX.1 they stand
beside the joint attention of pictures and text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from . import pulid
from .keys_values import BiasedKeysValues, KeysValues, NormedKeysValues
from .resampler import Perceiver, Resampler, Shapes
from .spec import AdapterSpec, Feature, Identity, parse_encoder_id

# The "C penalty" is relative to the widest layers of the base model.
WIDEST = {"SD1.5": 1280, "SDXL": 1280, "FLUX.1": 3072}


class ImageProjection(nn.Module):
    """Pooled CLIP embedding [n, E] -> [n, tokens, width] (Sec. 3.2)."""

    def __init__(self, features: int, tokens: int, width: int, operations: Any) -> None:
        super().__init__()
        self.proj = operations.Linear(features, tokens * width)
        self.norm = operations.LayerNorm(width)
        self.width = width

    @classmethod
    def from_shapes(cls, shapes: Shapes, operations: Any) -> ImageProjection:
        (rows, features), (width,) = shapes["proj.weight"], shapes["norm.weight"]
        return cls(features, rows // width, width, operations)

    def forward(self, embedding: Tensor) -> Tensor:
        return self.norm(self.proj(embedding).unflatten(-1, (-1, self.width)))


class FullFaceProjection(nn.Module):
    """CLIP hidden states [n, 257, E] -> [n, 257, width], position by position."""

    def __init__(self, features: int, width: int, operations: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            operations.Linear(features, features),
            nn.GELU(),
            operations.Linear(features, width),
            operations.LayerNorm(width),
        )

    @classmethod
    def from_shapes(cls, shapes: Shapes, operations: Any) -> FullFaceProjection:
        return cls(shapes["proj.0.weight"][1], shapes["proj.2.weight"][0], operations)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.proj(hidden)


class FaceProjection(nn.Module):
    """ArcFace direction [n, 512] -> [n, tokens, width] (FaceID, Portrait)."""

    def __init__(self, features: int, inner: int, tokens: int, width: int, operations: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            operations.Linear(features, inner), nn.GELU(), operations.Linear(inner, tokens * width)
        )
        self.norm = operations.LayerNorm(width)
        self.width = width

    @classmethod
    def from_shapes(cls, shapes: Shapes, operations: Any) -> FaceProjection:
        (inner, features), (rows, _), (width,) = (shapes[k] for k in ("proj.0.weight", "proj.2.weight", "norm.weight"))
        return cls(features, inner, rows // width, width, operations)

    def forward(self, face: Tensor) -> Tensor:
        return self.norm(self.proj(face).unflatten(-1, (-1, self.width)))


class FacePlusProjection(FaceProjection):
    """ArcFace direction [n, 512] and CLIP hidden states [n, 257, 1280] -> [n, tokens, width].

    x = face tokens, y = a perceiver that starts from x and reads the hidden states. Plus gives y; PlusV2, which has
    the same tensors, gives x + `shortcut` * y. `shortcut` None is Plus.
    """

    def __init__(
        self, features: int, inner: int, tokens: int, width: int, operations: Any, perceiver: Perceiver
    ) -> None:
        super().__init__(features, inner, tokens, width, operations)
        self.perceiver_resampler = perceiver

    @classmethod
    def from_shapes(cls, shapes: Shapes, operations: Any) -> FacePlusProjection:
        prefix = "perceiver_resampler."
        inner = {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}
        (hidden, features), (rows, _), (width,) = (shapes[k] for k in ("proj.0.weight", "proj.2.weight", "norm.weight"))
        return cls(features, hidden, rows // width, width, operations, Perceiver.from_shapes(inner, operations))

    def forward(self, face: Tensor, hidden: Tensor, shortcut: float | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = super().forward(face)
        y = self.perceiver_resampler(x, hidden)
        return y if shortcut is None else x + shortcut * y


class InfiniteProjection(nn.Module):
    """Infinite-ID's M_clip and M_face: ArcFace direction [n, 512] and CLIP's last states [n, 257, 1280] -> c_id.

    c_id [n, 257 + tokens, width]: the CLIP states one by one, then the face's tokens.
    """

    def __init__(self, hidden: int, width: int, face: FaceProjection, operations: Any) -> None:
        super().__init__()
        self.clip = nn.Sequential(operations.LayerNorm(hidden), operations.Linear(hidden, width))
        self.face = face

    @classmethod
    def from_shapes(cls, shapes: Shapes, operations: Any) -> InfiniteProjection:
        width, hidden = shapes["clip.1.weight"]
        inside = {key.removeprefix("face."): shape for key, shape in shapes.items() if key.startswith("face.")}
        return cls(hidden, width, FaceProjection.from_shapes(inside, operations), operations)

    def forward(self, face: Tensor, hidden: Tensor) -> Tensor:
        return torch.cat((self.clip(hidden), self.face(face)), dim=1)


class OmniProjection(nn.Module):
    """Omni-ID tokens [n, T, E] -> [n, T, width]; adapters without one read the tokens as they are."""

    def __init__(self, features: int, width: int, operations: Any) -> None:
        super().__init__()
        self.proj = operations.Linear(features, width)
        self.norm = operations.LayerNorm(width)

    @classmethod
    def from_shapes(cls, shapes: Shapes, operations: Any) -> nn.Module:
        if not shapes:
            return nn.Identity()
        width, features = shapes["proj.weight"]
        return cls(features, width, operations)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.proj(tokens))


def _zero(identity: Identity, feature: Feature, rows: Tensor) -> Tensor:
    return torch.zeros_like(rows)


def _grey(identity: Identity, feature: Feature, rows: Tensor) -> Tensor:
    """What the network gave for the zero picture; of a face's vector, zero."""
    if feature.network.startswith("arcface."):
        return torch.zeros_like(rows)
    return identity.zeros[need(identity, feature)].float().expand_as(rows)


def _black(identity: Identity, feature: Feature, rows: Tensor) -> Tensor:
    return held(identity, replace(feature, crop="black"))[0]


def _same(identity: Identity, feature: Feature, rows: Tensor) -> Tensor:
    return rows


# What the negative prompt's rows get in place of a feature's rows.
BLANKS: Mapping[str, Callable[[Identity, Feature, Tensor], Tensor]] = {
    "zero": _zero, "grey": _grey, "black": _black, "same": _same,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How one kind of adapter makes tokens: its projector, and what becomes of the features it reads.

    `unit` normalises ArcFace vectors; `sequence` reads all faces as one sequence and makes one set of tokens of them;
    `shortcut` is PlusV2's; `blank` names what stands for the features without the identity (BLANKS); `layer` makes keys
    and values of the tokens.
    """

    title: str
    projector: Callable[[Shapes, Any], nn.Module]
    unit: bool = False
    sequence: bool = False
    shortcut: bool = False
    blank: str = "zero"
    layer: Callable[[int, int, Any], nn.Module] = KeysValues


KINDS: dict[str, Kind] = {
    "image": Kind("IP-Adapter", ImageProjection.from_shapes),
    "plus": Kind("IP-Adapter Plus", Resampler.from_shapes, blank="grey"),
    "plus_face": Kind("IP-Adapter Plus-Face", Resampler.from_shapes, blank="grey"),
    "full_face": Kind("IP-Adapter Full-Face", FullFaceProjection.from_shapes, blank="grey"),
    "faceid": Kind("FaceID", FaceProjection.from_shapes, unit=True),
    "faceid_plus": Kind("FaceID-Plus", FacePlusProjection.from_shapes, unit=True, blank="grey"),
    "faceid_plus_v2": Kind("FaceID-PlusV2", FacePlusProjection.from_shapes, unit=True, blank="grey", shortcut=True),
    "portrait": Kind("FaceID-Portrait", FaceProjection.from_shapes, unit=True),
    "portrait_unnorm": Kind("FaceID-Portrait (unnorm)", Resampler.from_shapes, sequence=True),
    "instantid": Kind("InstantID", Resampler.from_shapes, sequence=True),
    "pulid": Kind("PuLID v1", pulid.IDEncoder, sequence=True),
    "pulid_v1_1": Kind("PuLID v1.1", pulid.IDFormer, sequence=True),
    "pulid_flux": Kind("PuLID-FLUX", pulid.IDFormer, sequence=True, layer=pulid.FluxAttention),
    "xlabs": Kind("XLabs FLUX IP-Adapter", ImageProjection.from_shapes, blank="black", layer=BiasedKeysValues),
    "instantx": Kind("InstantX FLUX IP-Adapter", FaceProjection.from_shapes, blank="same", layer=NormedKeysValues),
    "omni_id_adapter": Kind("Omni-ID", OmniProjection.from_shapes),
    "infinite_id": Kind("Infinite-ID", InfiniteProjection.from_shapes, unit=True),
}


class DecoupledAdapter(nn.Module):
    """A whole adapter file: the projector, and keys and values per attention under the file's own names."""

    def __init__(self, spec: AdapterSpec, projector: nn.Module, operations: Any) -> None:
        super().__init__()
        self.projector = projector
        self.layers = nn.ModuleDict()
        names = spec.names or [str(2 * i + 1) for i in range(len(spec.layers))]
        for name, hidden in zip(names, spec.layers, strict=True):
            side, _, number = name.rpartition(".")
            if side and side not in self.layers:
                self.layers[side] = nn.ModuleDict()
            home = self.layers.get_submodule(side)
            home.add_module(number, KINDS[spec.kind].layer(spec.width, hidden, operations))

    def project(self, layer: int | str, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """K' and V' [n, T, hidden] of the attention with the file's number or name `layer`."""
        return self.layer(layer)(tokens)

    def layer(self, name: int | str) -> nn.Module:
        """What makes these of tokens."""
        return self.layers.get_submodule(str(name))


@dataclass(frozen=True, eq=False)
class Tokens:
    """What the projector made of an identity: [n, T, width] for rows with and without the identity.

    `weight` [n] is each set's share; n is 1 where the adapter reads all faces at once.
    """

    cond: Tensor
    uncond: Tensor
    weight: Tensor


def need(identity: Identity, feature: Feature) -> str:
    """The encoder id of a feature that an adapter needs. Raises ValueError saying which node gives it."""
    key = identity.find(feature) or identity.find_joint(feature)
    if key is not None:
        return key
    loader = {
        "arcface": "Load Face Analyzer with the model pack",
        "clip": "an image encoder (Load CLIP Vision; for EVA-CLIP, Load Image Encoder) of the architecture",
        "siglip": "an image encoder (Load Image Encoder) of SigLIP",
        "omni_id": "Load Omni-ID Encoder",
    }
    family, _, which = feature.network.partition(".")
    keys = (*identity.embeddings, *identity.joint)
    have = ", ".join(sorted({str(parse_encoder_id(key)[0]) for key in keys})) or "no embedding at all"
    raise ValueError(
        f"identity {identity.name!r} holds {have}; this adapter needs {feature}; "
        f"connect {f'{loader.get(family, family)} {which}'.strip()} to Encode Identity and encode the photos again"
    )


def held(identity: Identity, feature: Feature) -> tuple[Tensor, Tensor]:
    """A feature in float32 and the weight of each of its rows: one row per face, or one for all faces together.

    Faces of weight 0 are left out, as if absent. Raises ValueError where the identity lacks the feature.
    """
    key = need(identity, feature)
    if key in identity.joint:
        return identity.joint[key].float(), torch.ones(1)
    keep = identity.weight > 0
    return identity.embeddings[key][keep].float(), identity.weight[keep].float()


def features(spec: AdapterSpec, identity: Identity) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What the projector reads: conditional and unconditional features, and the weights of their rows (see `held`).

    Raises ValueError where the identity lacks a feature.
    """
    kind = KINDS[spec.kind]
    cond: list[Tensor] = []
    uncond: list[Tensor] = []
    weight = torch.ones(0)
    for feature in spec.needs:
        rows, weight = held(identity, feature)
        face = feature.network.startswith("arcface.")
        cond.append(normalize(rows, dim=-1) if face and kind.unit else rows)
        uncond.append(BLANKS[kind.blank](identity, feature, rows))
    return cond, uncond, weight


def tokens(
    adapter: DecoupledAdapter,
    spec: AdapterSpec,
    identity: Identity,
    device: torch.device,
    shortcut: float = 1.0,
    *,
    one_by_one: bool = False,
) -> Tokens:
    """Run the projector on an identity, in float32 on `device`.

    `one_by_one` keeps the faces apart also where the adapter would read them as one sequence. Raises ValueError where
    the identity lacks a feature, or has no face of a weight above 0.
    """
    kind = KINDS[spec.kind]
    cond, uncond, weight = features(spec, identity)
    if not len(weight):
        raise ValueError(f"identity {identity.name!r} has only faces of weight 0; give one of them a weight")
    extra = {"shortcut": shortcut} if kind.shortcut else {}

    def run(rows: list[Tensor]) -> Tensor:
        rows = [row.to(device) for row in rows]
        if kind.sequence:
            rows = [row[:, None] if one_by_one else row[None] for row in rows]
        return adapter.projector(*rows, **extra)

    made = run(cond)
    blank = made if kind.blank == "same" else run(uncond)
    return Tokens(made, blank, weight if len(made) == len(weight) else weight.mean()[None])


def key_bias(tokens: Tokens, device: torch.device) -> Tensor | None:
    """What unequal faces add to the logits: log of their relative weight, [1, 1, n * T]; None where all are equal."""
    weight = tokens.weight / tokens.weight.mean()
    if bool((weight == 1).all()):
        return None
    return weight.log().repeat_interleave(tokens.cond.shape[1])[None, None].to(device)


def rows(cond: Tensor, uncond: Tensor, conditional: tuple[bool, ...], count: int, unfold: bool) -> Tensor:
    """Lay keys or values of n faces, [n, T, C] each, out for a batch of `count` rows per chunk.

    All faces in every row, [chunks * count, n * T, C]; or, unfolded, face i in row i and the last in all further ones,
    [chunks * count, T, C].
    """
    chunks = []
    for carries in conditional:
        faces = cond if carries else uncond
        if unfold:
            chunks += [faces[min(i, len(faces) - 1)][None] for i in range(count)]
        else:
            chunks.append(faces.flatten(0, 1)[None].expand(count, -1, -1))
    return torch.cat(chunks) if len(chunks) > 1 else chunks[0]


def _v_only(k: Tensor, v: Tensor, w: float, _c: float) -> tuple[Tensor, Tensor]:
    return k, v * w


def _k_and_v(k: Tensor, v: Tensor, w: float, _c: float) -> tuple[Tensor, Tensor]:
    return k * w, v * w


def _k_and_v_penalised(k: Tensor, v: Tensor, w: float, c: float) -> tuple[Tensor, Tensor]:
    return _k_and_v(k, v, w * c, c)


def _k_and_mean_v_penalised(k: Tensor, v: Tensor, w: float, c: float) -> tuple[Tensor, Tensor]:
    w = w * c
    mean = v.mean(dim=1, keepdim=True)
    return k * w, v - mean + w * mean


# How strength w enters a layer that is c times as wide as the base model's widest. Keys and values are fixed per run,
# so all of it is done once.
SCALINGS: Mapping[str, Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]] = {
    "V only": _v_only,
    "K+V": _k_and_v,
    "K+V w/ C penalty": _k_and_v_penalised,
    "K+mean(V) w/ C penalty": _k_and_mean_v_penalised,
}

"""IP-Adapter (arXiv 2308.06721) and its kin FaceID, InstantID (2401.07519), PuLID: a decoupled cross-attention.

    Z = Attention(Q, K, V) + strength * Attention(Q, K', V'),   K' = t W'_k,  V' = t W'_v         (Eq. 5)

t are the tokens that a projector makes of an identity's embeddings. This module has the table of adapter kinds, the
adapter module, the tokens of an identity, and how the strength enters a layer. In FLUX.1 the second attention is added
to the joint attention of image and text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..attention.key_value_projections import (
    BiasedKeyValueProjection,
    KeyValueProjection,
    NormalizedKeyValueProjection,
)
from ..spec import AdapterSpec, Feature, Identity, parse_encoder_id
from . import pulid
from .projectors import (
    FaceIDPlusProjection,
    FaceIDProjection,
    FullFaceProjection,
    ImageProjection,
    InfiniteIDProjection,
    OmniIDProjection,
)
from .resampler import Resampler, TensorShapes

# Widest layers of each base model, to which the "C penalty" is relative.
MAX_LAYER_WIDTHS = {"SD1.5": 1280, "SDXL": 1280, "FLUX.1": 3072}


def _zero_features(identity: Identity, feature: Feature, rows: Tensor) -> Tensor:
    return torch.zeros_like(rows)


def _zero_image_features(identity: Identity, feature: Feature, rows: Tensor) -> Tensor:
    """The network's output for the zero image; for an ArcFace embedding, zero."""
    if feature.network.startswith("arcface."):
        return torch.zeros_like(rows)
    return identity.zero_embeddings[require_encoder_id(identity, feature)].float().expand_as(rows)


def _black_image_features(identity: Identity, feature: Feature, rows: Tensor) -> Tensor:
    return get_feature_rows(identity, replace(feature, crop="black"))[0]


def _same_features(identity: Identity, feature: Feature, rows: Tensor) -> Tensor:
    return rows


# What the projector reads for the rows of the negative prompt.
UNCOND_FEATURES: Mapping[str, Callable[[Identity, Feature, Tensor], Tensor]] = {
    "zero": _zero_features,
    "zero_image": _zero_image_features,
    "black_image": _black_image_features,
    "same": _same_features,
}


@dataclass(frozen=True)
class AdapterKind:
    """How one kind of adapter makes tokens, and keys and values of tokens.

    `projector` builds the projector from the shapes of its tensors; `normalize_arcface` scales ArcFace embeddings to
    unit length; `faces_as_sequence` makes one set of tokens of all faces together; `shortcut` is FaceID-PlusV2's;
    `uncond_features` is a key of UNCOND_FEATURES; `key_value_layer` builds W'_k and W'_v of one attention.
    """

    title: str
    projector: Callable[[TensorShapes, Any], nn.Module]
    normalize_arcface: bool = False
    faces_as_sequence: bool = False
    shortcut: bool = False
    uncond_features: str = "zero"
    key_value_layer: Callable[[int, int, Any], nn.Module] = KeyValueProjection


ADAPTER_KINDS: dict[str, AdapterKind] = {
    "image": AdapterKind("IP-Adapter", ImageProjection.from_shapes),
    "plus": AdapterKind("IP-Adapter Plus", Resampler.from_shapes, uncond_features="zero_image"),
    "plus_face": AdapterKind("IP-Adapter Plus-Face", Resampler.from_shapes, uncond_features="zero_image"),
    "full_face": AdapterKind("IP-Adapter Full-Face", FullFaceProjection.from_shapes, uncond_features="zero_image"),
    "faceid": AdapterKind("FaceID", FaceIDProjection.from_shapes, normalize_arcface=True),
    "faceid_plus": AdapterKind(
        "FaceID-Plus", FaceIDPlusProjection.from_shapes, normalize_arcface=True, uncond_features="zero_image"
    ),
    "faceid_plus_v2": AdapterKind(
        "FaceID-PlusV2",
        FaceIDPlusProjection.from_shapes,
        normalize_arcface=True,
        uncond_features="zero_image",
        shortcut=True,
    ),
    "portrait": AdapterKind("FaceID-Portrait", FaceIDProjection.from_shapes, normalize_arcface=True),
    "portrait_unnorm": AdapterKind("FaceID-Portrait (unnorm)", Resampler.from_shapes, faces_as_sequence=True),
    "instantid": AdapterKind("InstantID", Resampler.from_shapes, faces_as_sequence=True),
    "pulid": AdapterKind("PuLID v1", pulid.IDEncoder, faces_as_sequence=True),
    "pulid_v1_1": AdapterKind("PuLID v1.1", pulid.IDFormer, faces_as_sequence=True),
    "pulid_flux": AdapterKind(
        "PuLID-FLUX", pulid.IDFormer, faces_as_sequence=True, key_value_layer=pulid.PuLIDFluxAttention
    ),
    "xlabs": AdapterKind(
        "XLabs FLUX IP-Adapter",
        ImageProjection.from_shapes,
        uncond_features="black_image",
        key_value_layer=BiasedKeyValueProjection,
    ),
    "instantx": AdapterKind(
        "InstantX FLUX IP-Adapter",
        FaceIDProjection.from_shapes,
        uncond_features="same",
        key_value_layer=NormalizedKeyValueProjection,
    ),
    "omni_id_adapter": AdapterKind("Omni-ID", OmniIDProjection.from_shapes),
    "infinite_id": AdapterKind("Infinite-ID", InfiniteIDProjection.from_shapes, normalize_arcface=True),
}


class DecoupledAdapter(nn.Module):
    """A complete adapter: the projector, and W'_k and W'_v of each attention under the names in the file."""

    def __init__(self, spec: AdapterSpec, projector: nn.Module, operations: Any) -> None:
        super().__init__()
        self.projector = projector
        self.layers = nn.ModuleDict()
        names = spec.layer_names or [str(2 * i + 1) for i in range(len(spec.layers))]
        for name, hidden in zip(names, spec.layers, strict=True):
            parent, _, number = name.rpartition(".")
            if parent and parent not in self.layers:
                self.layers[parent] = nn.ModuleDict()
            layer = ADAPTER_KINDS[spec.kind].key_value_layer(spec.width, hidden, operations)
            self.layers.get_submodule(parent).add_module(number, layer)

    def project_tokens(self, name: int | str, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """K' and V' [n, T, hidden] of an attention, by its number or name in the file."""
        return self.get_layer(name)(tokens)

    def get_layer(self, name: int | str) -> nn.Module:
        """The key and value projections of an attention, by its number or name in the file."""
        return self.layers.get_submodule(str(name))


@dataclass(frozen=True, eq=False)
class IdentityTokens:
    """The projector's output for an identity: [n, T, width] for rows with and without the identity.

    `weight` [n] is the weight of each set of tokens; n is 1 where the adapter reads all faces together.
    """

    cond: Tensor
    uncond: Tensor
    weight: Tensor


REQUIRED_LOADERS = {
    "arcface": "Load Face Analyzer with the model pack",
    "clip": "an image encoder (Load CLIP Vision; for EVA-CLIP, Load Image Encoder) of the architecture",
    "siglip": "an image encoder (Load Image Encoder) of SigLIP",
    "omni_id": "Load Omni-ID Encoder",
}


def require_encoder_id(identity: Identity, feature: Feature) -> str:
    """The encoder id of a feature that an adapter needs. Raises ValueError naming the node that provides it."""
    key = identity.find_embedding(feature) or identity.find_joint_embedding(feature)
    if key is not None:
        return key
    family, _, architecture = feature.network.partition(".")
    keys = (*identity.embeddings, *identity.joint_embeddings)
    available = ", ".join(sorted({str(parse_encoder_id(key)[0]) for key in keys})) or "no embedding at all"
    raise ValueError(
        f"identity {identity.name!r} holds {available}; this adapter needs {feature}; "
        f"connect {f'{REQUIRED_LOADERS.get(family, family)} {architecture}'.strip()} to Encode Identity "
        "and encode the photos again"
    )


def get_feature_rows(identity: Identity, feature: Feature) -> tuple[Tensor, Tensor]:
    """A feature in float32 and the weight of each row: one row per face, or one for all faces together.

    Faces of weight 0 are left out, as if absent. Raises ValueError where the identity lacks the feature.
    """
    key = require_encoder_id(identity, feature)
    if key in identity.joint_embeddings:
        return identity.joint_embeddings[key].float(), torch.ones(1)
    keep = identity.weight > 0
    return identity.embeddings[key][keep].float(), identity.weight[keep].float()


def gather_projector_inputs(spec: AdapterSpec, identity: Identity) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The projector's conditional and unconditional inputs, and the weights of their rows (see get_feature_rows).

    Raises ValueError where the identity lacks a feature.
    """
    kind = ADAPTER_KINDS[spec.kind]
    cond: list[Tensor] = []
    uncond: list[Tensor] = []
    weight = torch.ones(0)
    for feature in spec.needs:
        rows, weight = get_feature_rows(identity, feature)
        is_arcface = feature.network.startswith("arcface.")
        cond.append(normalize(rows, dim=-1) if is_arcface and kind.normalize_arcface else rows)
        uncond.append(UNCOND_FEATURES[kind.uncond_features](identity, feature, rows))
    return cond, uncond, weight


def project_identity(
    adapter: DecoupledAdapter,
    spec: AdapterSpec,
    identity: Identity,
    device: torch.device,
    shortcut: float = 1.0,
    *,
    separate_faces: bool = False,
) -> IdentityTokens:
    """Run the projector on an identity, in float32 on `device`.

    `separate_faces` makes a set of tokens per face even where the adapter reads the faces as one sequence. Raises
    ValueError where the identity lacks a feature, or has no face with a weight above 0.
    """
    kind = ADAPTER_KINDS[spec.kind]
    cond, uncond, weight = gather_projector_inputs(spec, identity)
    if not len(weight):
        raise ValueError(f"identity {identity.name!r} has only faces of weight 0; give one of them a weight")
    options = {"shortcut": shortcut} if kind.shortcut else {}

    def project(features: list[Tensor]) -> Tensor:
        rows = [row.to(device) for row in features]
        if kind.faces_as_sequence:
            rows = [row[:, None] if separate_faces else row[None] for row in rows]
        return adapter.projector(*rows, **options)

    cond_tokens = project(cond)
    uncond_tokens = cond_tokens if kind.uncond_features == "same" else project(uncond)
    is_per_face = len(cond_tokens) == len(weight)
    return IdentityTokens(cond_tokens, uncond_tokens, weight if is_per_face else weight.mean()[None])


def compute_face_key_bias(identity_tokens: IdentityTokens, device: torch.device) -> Tensor | None:
    """The logit bias of unequal faces: log of their relative weight, [1, 1, n * T]; None where all are equal."""
    weight = identity_tokens.weight / identity_tokens.weight.mean()
    if bool((weight == 1).all()):
        return None
    return weight.log().repeat_interleave(identity_tokens.cond.shape[1])[None, None].to(device)


def arrange_batch_rows(
    cond: Tensor, uncond: Tensor, is_conditional: tuple[bool, ...], images: tuple[int, ...], unfold: bool
) -> Tensor:
    """Keys or values of n faces, [n, T, C] each, for a batch of chunks, each of which has a row for these images.

    Every row gets all faces, [rows, n * T, C]. With `unfold`, image i gets face i only, and further images the last
    face, [rows, T, C].
    """
    chunks = []
    for conditional in is_conditional:
        faces = cond if conditional else uncond
        if unfold:
            chunks += [faces[min(image, len(faces) - 1)][None] for image in images]
        else:
            chunks.append(faces.flatten(0, 1)[None].expand(len(images), -1, -1))
    return torch.cat(chunks) if len(chunks) > 1 else chunks[0]


def _v_only(k: Tensor, v: Tensor, w: float, _c: float) -> tuple[Tensor, Tensor]:
    return k, v * w


def _k_and_v(k: Tensor, v: Tensor, w: float, _c: float) -> tuple[Tensor, Tensor]:
    return k * w, v * w


def _k_and_v_penalized(k: Tensor, v: Tensor, w: float, c: float) -> tuple[Tensor, Tensor]:
    return _k_and_v(k, v, w * c, c)


def _k_and_mean_v_penalized(k: Tensor, v: Tensor, w: float, c: float) -> tuple[Tensor, Tensor]:
    w = w * c
    mean = v.mean(dim=1, keepdim=True)
    return k * w, v - mean + w * mean


# How the strength w enters the keys and values of a layer that is c times as wide as the base model's widest. Both are
# fixed during a run, so this happens once.
STRENGTH_SCALINGS: Mapping[str, Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]] = {
    "V only": _v_only,
    "K+V": _k_and_v,
    "K+V w/ C penalty": _k_and_v_penalized,
    "K+mean(V) w/ C penalty": _k_and_mean_v_penalized,
}

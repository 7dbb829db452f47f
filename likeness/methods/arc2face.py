"""Arc2Face (arXiv 2403.11641): a face as a token of "photo of a id person", encoded by a text encoder trained for it.

The ArcFace unit embedding, padded with zeros, replaces the token embedding of `id`; the 77 states condition Arc2Face's
own UNet. In a text encoder that is narrower than the ArcFace embedding it replaces several such tokens.

File: the authors' `encoder/`, a CLIP-L text model in the transformers layout; or the native format, which adds metadata
under `likeness`: kind, version, base, heads, faces (the features that it reads), notes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ..checkpoints import native_metadata
from ..checkpoints.checkpoint_detection import ARCFACE_ANTELOPEV2
from ..encoders.clip_text import CONTEXT_LENGTH, CLIPTextModel, pad_token_ids
from ..spec import Arc2FaceSpec, Feature, Identity
from .ip_adapter import require_encoder_id

KIND = "arc2face"
PROMPT_PREFIX_IDS, ID_TOKEN_ID, PROMPT_SUFFIX_IDS = (1125, 539, 320), 1014, (2533,)
ID_PROMPT_IDS = (*PROMPT_PREFIX_IDS, ID_TOKEN_ID, *PROMPT_SUFFIX_IDS)  # photo of a id person
FACE_TOKEN_INDEX = 4  # position of the face, counting the start token
# In order of preference: its own recognizer, and the recognizer that it replaces in the antelopev2 pack.
FACE_FEATURES = (Feature("arcface.arc2face", "raw", "face112"), ARCFACE_ANTELOPEV2)
PUBLISHED_SPEC = Arc2FaceSpec("SD1.5", 12, FACE_FEATURES)


def get_face_vectors(identity: Identity, features: Sequence[Feature] = FACE_FEATURES) -> tuple[Tensor, Tensor]:
    """ArcFace unit embeddings [n, 512] and the faces' weights [n], which sum to 1, without faces of weight 0.

    Uses the first of `features` that the identity holds. Raises ValueError where it holds none.
    """
    feature = next((feature for feature in features if identity.find_embedding(feature)), features[-1])
    rows, keep = identity.embeddings[require_encoder_id(identity, feature)].float(), identity.weight > 0
    if not keep.any():
        raise ValueError(f"identity {identity.name!r} has only faces of weight 0; give one of them a weight")
    weight = identity.weight[keep].float()
    return normalize(rows[keep], dim=-1), weight / weight.sum()


def average_face_vectors(face_vectors: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean of unit embeddings, at unit length: [1, 512]."""
    return normalize((weight[:, None] * face_vectors).sum(0, keepdim=True), dim=-1)


def encode_face_prompt(model: CLIPTextModel, face_vectors: Tensor) -> Tensor:
    """The states [n, 77, D] of the prompt with each face [n, 512] in it; zeros stand for no face."""
    width = model.sizes["width"]
    count = -(-face_vectors.shape[-1] // width)
    token_ids = pad_token_ids((*PROMPT_PREFIX_IDS, *[ID_TOKEN_ID] * count, *PROMPT_SUFFIX_IDS))
    embeddings = model.embed_tokens(token_ids, face_vectors.device).repeat(len(face_vectors), 1, 1)
    padded = pad(face_vectors, (0, count * width - face_vectors.shape[-1]))
    embeddings[:, FACE_TOKEN_INDEX : FACE_TOKEN_INDEX + count] = padded.unflatten(-1, (count, width))
    return model(embeddings)


def encode_empty_prompt(model: CLIPTextModel, device: torch.device) -> Tensor:
    """The states [1, 77, D] of the empty prompt, the authors' negative prompt."""
    return model(model.embed_tokens(pad_token_ids((), CONTEXT_LENGTH), device))


@dataclass(frozen=True)
class Arc2FaceMetadata(native_metadata.NativeMetadata):
    kind = KIND
    heads: int
    faces: tuple[Feature, ...]


def make_arc2face_metadata(spec: Arc2FaceSpec) -> dict[str, str]:
    """The metadata of a text encoder's safetensors file."""
    return native_metadata.encode_metadata(Arc2FaceMetadata, spec)


def read_arc2face_spec(metadata: Mapping[str, Any], file: str) -> Arc2FaceSpec:
    """The spec of a file's metadata. Raises ValueError where it is incomplete or of a newer version."""
    stored = native_metadata.decode_metadata(Arc2FaceMetadata, metadata, file)
    if not stored.faces:
        raise ValueError(f"got {file}, which reads no face; expected at least one in faces; fetch the file again")
    return Arc2FaceSpec(stored.base, stored.heads, stored.faces, stored.notes)

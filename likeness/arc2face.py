"""Arc2Face (arXiv 2403.11641): a face as a word of "photo of a id person", read by a text encoder trained for it.

The ArcFace direction, followed by zeros, takes the place of the word `id`; the 77 states condition Arc2Face's own UNet.
In a text encoder that is narrower than a face it takes the place of as many such words as it needs.

File: the authors' `encoder/`, a CLIP-L text model in the transformers layout; or one trained here, which has metadata
under `likeness` besides: kind, version, base, heads, faces (the features that it reads), notes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from . import own_file
from .clip_text import LENGTH, TextModel, padded
from .decoupled import need
from .detect import FACE_ANTELOPE
from .spec import Arc2FaceSpec, Feature, Identity

KIND = "arc2face"
BEFORE, ID, AFTER = (1125, 539, 320), 1014, (2533,)
PROMPT = (*BEFORE, ID, *AFTER)  # photo of a id person
AT = 4  # where the face stands, the start counted
# Its own recogniser, and that of the pack whose place the authors give it, in the order of preference.
FACES = (Feature("arcface.arc2face", "raw", "face112"), FACE_ANTELOPE)
PUBLISHED = Arc2FaceSpec("SD1.5", 12, FACES)


def metadata(spec: Arc2FaceSpec) -> dict[str, str]:
    """What a file tells of itself, for safetensors."""
    faces = [str(feature) for feature in spec.faces]
    return own_file.metadata(KIND, spec.base, spec.notes, heads=spec.heads, faces=faces)


def read_spec(told: Mapping[str, Any], file: str) -> Arc2FaceSpec:
    """The spec of a file's metadata. Raises ValueError where it is not whole or of a newer version."""
    own_file.check(told, KIND, {"heads": int, "faces": list}, {}, file)
    faces = own_file.features(told["faces"], file)
    if not faces:
        raise ValueError(f"got {file}, which reads no face; expected at least one in faces; fetch the file again")
    return Arc2FaceSpec(told["base"], told["heads"], faces, told["notes"])


def faces(identity: Identity, features: Sequence[Feature] = FACES) -> tuple[Tensor, Tensor]:
    """ArcFace directions [n, 512] and the faces' weights [n], summing to 1; those of weight 0 are left out.

    The first of `features` that the identity holds counts. Raises ValueError where it holds none.
    """
    feature = next((one for one in features if identity.find(one)), features[-1])
    rows, keep = identity.embeddings[need(identity, feature)].float(), identity.weight > 0
    if not keep.any():
        raise ValueError(f"identity {identity.name!r} has only faces of weight 0; give one of them a weight")
    weight = identity.weight[keep].float()
    return normalize(rows[keep], dim=-1), weight / weight.sum()


def mean_face(rows: Tensor, weight: Tensor) -> Tensor:
    """The direction [1, 512] amid several."""
    return normalize((weight[:, None] * rows).sum(0, keepdim=True), dim=-1)


def tokens(model: TextModel, rows: Tensor) -> Tensor:
    """The states [n, 77, D] of the prompt with each face direction [n, 512] in it; zeros are nobody's face."""
    width = model.size["width"]
    count = -(-rows.shape[-1] // width)
    words = model.words(padded((*BEFORE, *[ID] * count, *AFTER)), rows.device).repeat(len(rows), 1, 1)
    words[:, AT : AT + count] = pad(rows, (0, count * width - rows.shape[-1])).unflatten(-1, (count, width))
    return model(words)


def nothing(model: TextModel, device: torch.device) -> Tensor:
    """The states [1, 77, D] of the empty prompt, which the authors' negative prompt is."""
    return model(model.words(padded((), LENGTH), device))

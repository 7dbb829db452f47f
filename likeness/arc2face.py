"""Arc2Face (arXiv 2403.11641): a face as a word of "photo of a id person", read by a text encoder trained for it.

The ArcFace direction, followed by zeros, takes the place of the word `id`; the 77 states condition Arc2Face's own UNet.
File: the authors' `encoder/`, a CLIP-L text model in the transformers layout.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from .clip_text import LENGTH, TextModel, padded
from .decoupled import need
from .detect import FACE_ANTELOPE
from .spec import Feature, Identity

PROMPT = (1125, 539, 320, 1014, 2533)  # photo of a id person
AT = 4  # where the face stands, the start counted
# Its own recogniser, and that of the pack whose place the authors give it, in the order of preference.
FACES = (Feature("arcface.arc2face", "raw", "face112"), FACE_ANTELOPE)


def faces(identity: Identity) -> tuple[Tensor, Tensor]:
    """ArcFace directions [n, 512] and the faces' weights [n], summing to 1; those of weight 0 are left out.

    Raises ValueError where the identity holds none.
    """
    feature = next((one for one in FACES if identity.find(one)), FACES[-1])
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
    words = model.words(padded(PROMPT), rows.device).repeat(len(rows), 1, 1)
    words[:, AT] = pad(rows, (0, words.shape[-1] - rows.shape[-1]))
    return model(words)


def nothing(model: TextModel, device: torch.device) -> Tensor:
    """The states [1, 77, D] of the empty prompt, which the authors' negative prompt is."""
    return model(model.words(padded((), LENGTH), device))

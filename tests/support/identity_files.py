"""Identities with every kind of embedding, and the bytes of their files."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import torch
from comfyui_likeness.likeness.spec import Feature, Identity

from .identities import ENCODER_HASH, make_identity

DATE = datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
ARCFACE = Feature("arcface.buffalo_l", "raw", "face112")
CLIP_GRID = Feature("clip.vit-h-14", "penultimate", "head")
OMNI_ID_TOKENS = Feature("omni_id", "tokens", "face224")
FACE_FIELDS = ("box", "kps", "score", "weight")


def make_full_identity(faces: int = 2, crops: bool = True) -> Identity:
    one = make_identity((ARCFACE, CLIP_GRID), ((8,), (3, 4)), faces)
    key = CLIP_GRID.format_encoder_id(ENCODER_HASH)
    half = dict(one.embeddings) | {key: one.embeddings[key].half()}
    zeros = {key: one.zero_embeddings[key].half().expand(1, 3, 4)}
    crop = torch.randint(0, 256, (faces, 5, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return replace(one, name="Zoë Müller", embeddings=half, zero_embeddings=zeros, crop=crop if crops else None)


def make_jointly_encoded_identity(faces: int = 2, crops: bool = True) -> Identity:
    """The are_identical with a joint embedding of all faces."""
    one = make_full_identity(faces, crops)
    tokens = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(2)).half()
    return replace(
        one,
        joint_embeddings={OMNI_ID_TOKENS.format_encoder_id(ENCODER_HASH): tokens},
        hashes=dict(one.hashes) | {OMNI_ID_TOKENS.format_encoder_id(ENCODER_HASH): ENCODER_HASH},
    )


def are_identical(a: Identity, b: Identity) -> bool:
    """Bit-identical, dtypes included."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in FACE_FIELDS]
    pairs += [(a.crop, b.crop)] if a.crop is not None and b.crop is not None else []
    for x, y in (
        (a.embeddings, b.embeddings),
        (a.zero_embeddings, b.zero_embeddings),
        (a.joint_embeddings, b.joint_embeddings),
    ):
        if list(x) != list(y):
            return False
        pairs += [(x[key], y[key]) for key in x]
    metadata = [(identity.name, identity.sources, dict(identity.hashes), identity.crop is None) for identity in (a, b)]
    return metadata[0] == metadata[1] and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_header(head: bytes, rest: bytes) -> bytes:
    return len(head).to_bytes(8, "little") + head + rest

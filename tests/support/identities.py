"""Identities from seeds, with the embeddings that the adapters in the tests need."""

from __future__ import annotations

import torch
from comfyui_likeness.likeness.spec import Feature, Identity

ENCODER_HASH = "0123456789abcdef" * 4


def make_identity(
    features: tuple[Feature, ...], shapes: tuple[tuple[int, ...], ...], faces: int = 1, seed: int = 0
) -> Identity:
    """An identity that holds `features`, with one embedding of the given shape per face."""
    generator = torch.Generator().manual_seed(seed)
    ids = [feature.format_encoder_id(ENCODER_HASH) for feature in features]
    return Identity(
        name=f"person {seed}",
        box=torch.tensor([[128.0, 128.0, 384.0, 384.0]]).repeat(faces, 1),
        kps=torch.tensor([[[200.0, 220], [310, 220], [256, 280], [210, 330], [300, 330]]]).repeat(faces, 1, 1),
        score=torch.full((faces,), 0.9),
        weight=torch.ones(faces),
        embeddings={
            key: torch.randn(faces, *shape, generator=generator) for key, shape in zip(ids, shapes, strict=True)
        },
        zero_embeddings={
            key: torch.randn(1, *shape, generator=generator) for key, shape in zip(ids, shapes, strict=True)
        },
        sources=tuple(f"photo {i + 1}" for i in range(faces)),
        hashes={key: ENCODER_HASH for key in ids},
    )

"""Identities from seeds, with the embeddings that the adapters of the tests read."""

from __future__ import annotations

import torch
from comfyui_likeness.likeness.spec import Feature, Identity

HASH = "0123456789abcdef" * 4


def identity(
    needs: tuple[Feature, ...], shapes: tuple[tuple[int, ...], ...], faces: int = 1, seed: int = 0
) -> Identity:
    """An identity of some faces that holds `needs`, one embedding of the given shape per face."""
    generator = torch.Generator().manual_seed(seed)
    ids = [feature.id(HASH) for feature in needs]
    return Identity(
        name=f"person {seed}",
        box=torch.tensor([[128.0, 128.0, 384.0, 384.0]]).repeat(faces, 1),
        kps=torch.tensor([[[200.0, 220], [310, 220], [256, 280], [210, 330], [300, 330]]]).repeat(faces, 1, 1),
        score=torch.full((faces,), 0.9),
        weight=torch.ones(faces),
        embeddings={
            key: torch.randn(faces, *shape, generator=generator) for key, shape in zip(ids, shapes, strict=True)
        },
        zeros={key: torch.randn(1, *shape, generator=generator) for key, shape in zip(ids, shapes, strict=True)},
        sources=tuple(f"photo {i + 1}" for i in range(faces)),
        hashes={key: HASH for key in ids},
    )

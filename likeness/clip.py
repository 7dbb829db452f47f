"""CLIP and SigLIP image encoders: the names of their architectures, and which of their layers the adapters read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

# (width, layers, patch, image size) -> the architecture's name in encoder ids
ARCHITECTURES = {
    (768, 12, 32, 224): "vit-b-32",
    (768, 12, 16, 224): "vit-b-16",
    (1024, 24, 14, 224): "vit-l-14",
    (1024, 24, 14, 336): "vit-l-14-336",
    (1280, 32, 14, 224): "vit-h-14",
    (1408, 40, 14, 224): "vit-g-14",
    (1664, 48, 14, 224): "vit-bigg-14",
}

# The same of EVA-CLIP's towers with rotary positions; they count those in steps of a patch of 224 pixels.
EVA = {
    (1024, 24, 14, 224): "eva02-l-14",
    (1024, 24, 14, 336): "eva02-l-14-336",
}
SIGLIP = {
    (1152, 27, 14, 384): "so400m-14-384",
}
SIGLIP_SIZES = {(729, 14): 384}  # positions and patch -> pixels, where patches do not fill the picture
EVA_GRID = (16, 16)
EVA_LEVELS = (4, 8, 12, 16, 20)  # the blocks whose inputs PuLID reads

# Where the published towers, and Portrait World's of 128, do not have heads of 64: width -> width of a head.
HEAD_WIDTHS = {128: 32, 1152: 72, 1280: 80, 1408: 88, 1664: 104, 1792: 112}

QUICK = ("openai", "quickgelu", "dfn", "metaclip")

# Which layers on which crops the pack's adapters read; of other architectures, what the family's base adapter reads.
LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "vit-h-14": {
        "photo": ("projected", "penultimate"),
        "head": ("projected", "penultimate"),
        "face224": ("penultimate", "last"),
        "face256": ("penultimate",),
    },
    "vit-bigg-14": {"photo": ("projected",), "head": ("projected",)},
    "vit-l-14": {"photo": ("projected", "penultimate"), "black": ("projected",)},
    "vit-l-14-336": {"photo": ("penultimate",), "face336": ("penultimate",)},
    "eva02-l-14-336": {"ffhq512": ("projected", "levels")},
    "vit-128-4-16-128": {"photo": ("projected",), "head": ("penultimate",), "face224": ("last",)},  # the demo's
}
OTHER_LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "clip": {"photo": ("projected", "penultimate")},
    "siglip": {"photo": ("pooled",)},
}
NAMES = {"vit": ARCHITECTURES, "eva02": EVA, "so": SIGLIP}


def architecture(width: int, layers: int, patch: int, size: int, kind: str = "vit") -> str:
    """The name of a vision transformer; one that the tables do not have is named by its numbers."""
    return NAMES[kind].get((width, layers, patch, size), f"{kind}-{width}-{layers}-{patch}-{size}")


def is_quick(name: str, file: str) -> bool:
    """Whether a network of this architecture, from a file of this name, was trained with QuickGELU.

    OpenAI and those who went on from its code did; for ViT-L/14-336 there is nothing else.
    """
    return name == "vit-l-14-336" or any(word in file.lower() for word in QUICK)


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """A sha256, 64 hex digits, over the names, shapes and first values of all weights.

    Values count in half precision, as that is what a file may hold and what a machine may load it to.
    """
    digest = hashlib.sha256()
    for key in sorted(weights):
        first = weights[key].flatten()[:16].half().float().tolist()
        digest.update(f"{key} {tuple(weights[key].shape)} {first}".encode())
    return digest.hexdigest()

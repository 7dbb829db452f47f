"""CLIP and SigLIP image encoders: names of the architectures, and the layers that the adapters read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

# (width, layers, patch size, image size) -> the architecture's name in encoder ids
VIT_ARCHITECTURES = {
    (768, 12, 32, 224): "vit-b-32",
    (768, 12, 16, 224): "vit-b-16",
    (1024, 24, 14, 224): "vit-l-14",
    (1024, 24, 14, 336): "vit-l-14-336",
    (1280, 32, 14, 224): "vit-h-14",
    (1408, 40, 14, 224): "vit-g-14",
    (1664, 48, 14, 224): "vit-bigg-14",
}

# The same for EVA-CLIP's towers with rotary position embeddings, which are interpolated from the grid at 224 pixels.
EVA_ARCHITECTURES = {
    (1024, 24, 14, 224): "eva02-l-14",
    (1024, 24, 14, 336): "eva02-l-14-336",
}
SIGLIP_ARCHITECTURES = {
    (1152, 27, 14, 384): "so400m-14-384",
}
SIGLIP_IMAGE_SIZES = {(729, 14): 384}  # (positions, patch size) -> image size that is not a multiple of the patch size
EVA_ROPE_GRID = (16, 16)
EVA_LEVEL_BLOCKS = (4, 8, 12, 16, 20)  # blocks whose inputs PuLID reads

# Width of a published tower -> width of an attention head. 128 and 160 are Portrait World's towers.
HEAD_DIMS = {
    128: 32, 160: 32, 192: 64, 384: 64, 512: 64, 768: 64, 896: 64, 1024: 64, 1152: 72, 1280: 80, 1408: 88, 1664: 104,
    1792: 112,
}  # fmt: skip

QUICK_GELU_NAMES = ("openai", "quickgelu", "dfn", "metaclip")

PORTRAIT_WORLD_LAYERS = {"photo": ("projected",), "head": ("penultimate",), "face224": ("last",)}
# Architecture -> crop -> layers that the pack's adapters read.
LAYERS_BY_ARCHITECTURE: dict[str, dict[str, tuple[str, ...]]] = {
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
    "vit-128-4-16-128": PORTRAIT_WORLD_LAYERS,
    "vit-160-5-16-128": PORTRAIT_WORLD_LAYERS,
}
# For architectures not in the table above.
DEFAULT_LAYERS_BY_FAMILY: dict[str, dict[str, tuple[str, ...]]] = {
    "clip": {"photo": ("projected", "penultimate")},
    "siglip": {"photo": ("pooled",)},
}
ARCHITECTURE_NAMES = {"vit": VIT_ARCHITECTURES, "eva02": EVA_ARCHITECTURES, "so": SIGLIP_ARCHITECTURES}


def name_architecture(width: int, num_layers: int, patch_size: int, image_size: int, prefix: str = "vit") -> str:
    """The name of a vision transformer, built from its sizes if it is not in the tables."""
    return ARCHITECTURE_NAMES[prefix].get(
        (width, num_layers, patch_size, image_size), f"{prefix}-{width}-{num_layers}-{patch_size}-{image_size}"
    )


def get_published_head_count(width: int, file: str) -> int:
    """The number of attention heads of the published towers of a width, which tensors do not tell. Raises ValueError
    for other widths."""
    if width not in HEAD_DIMS:
        raise ValueError(
            f"choose a published image encoder: got {file}, of width {width}, whose number of attention heads its "
            f"tensors do not tell; expected a width of {', '.join(map(str, HEAD_DIMS))}"
        )
    return width // HEAD_DIMS[width]


def uses_quick_gelu(architecture: str, file_name: str) -> bool:
    """Whether a network was trained with QuickGELU, guessed from its architecture and file name.

    OpenAI's models use it, and ViT-L/14-336 was only released by OpenAI.
    """
    return architecture == "vit-l-14-336" or any(word in file_name.lower() for word in QUICK_GELU_NAMES)


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """A sha256, 64 hex digits, of the names, shapes and first 16 values of all weights.

    Values are rounded to half precision, so that the hash does not depend on the dtype of the file or of the model.
    """
    digest = hashlib.sha256()
    for key in sorted(weights):
        first = weights[key].flatten()[:16].half().float().tolist()
        digest.update(f"{key} {tuple(weights[key].shape)} {first}".encode())
    return digest.hexdigest()

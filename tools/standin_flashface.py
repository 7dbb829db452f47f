"""FlashFace checkpoints from seeds: the names and the layout of the authors' file, as narrow as the host allows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shape = tuple[int, ...]

# The host's names -> the authors', one after the other.
NAMES = (
    (r"time_embed\.", "time_embedding."),
    (r"^out\.", "head."),
    (r"input_blocks\.0\.0\.", "encoder.0."),
    (r"input_blocks\.(\d+)\.0\.op\.", r"encoder.\1."),
    (r"input_blocks\.", "encoder."),
    (r"middle_block\.", "middle."),
    (r"output_blocks\.(\d+)\.(\d)\.conv\.", r"decoder.\1.\2.1."),
    (r"output_blocks\.", "decoder."),
    (r"in_layers\.", "layer1."),
    (r"emb_layers\.", "embedding."),
    (r"out_layers\.", "layer2."),
    (r"skip_connection\.", "shortcut."),
    (r"(\d)\.norm\.", r"\1.norm1."),
    (r"proj_in\.", "conv1."),
    (r"proj_out\.", "conv2."),
    (r"transformer_blocks\.", "blocks."),
    (r"attn1\.", "self_attn."),
    (r"attn2\.", "cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"ff\.net\.", "ffn."),
)
SHARED = ("time_embedding.", "head.")


def official(name: str) -> str:
    """The authors' name of a tensor of the host's UNet."""
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name


def names(unet: Mapping[str, Shape], channels: int) -> dict[str, Shape]:
    """Every tensor of a FlashFace file over such a UNet of 4 input channels, once each, and its shape.

    `channels` are the input channels of the UNet that paints: 5 with the face's position, 9 for inpainting.
    """
    plain = {official(key): tuple(shape) for key, shape in unet.items()}
    out = {key: shape for key, shape in plain.items() if key.startswith(SHARED)}
    rest = {key: shape for key, shape in plain.items() if key not in out}
    out |= {f"ori_{key}": shape for key, shape in rest.items()} | {f"ref_{key}": shape for key, shape in rest.items()}
    first = "ori_encoder.0.weight"
    out[first] = (out[first][0], channels, *out[first][2:])
    for key, shape in rest.items():
        if ".self_attn." in key and not key.startswith("encoder."):
            out[f"ori_{key.replace('.self_attn.', '.self_attn.self_attn_first.')}"] = shape
    return out


def with_aliases(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the second names that the authors' file has for the UNet that paints."""
    return {**tensors, **{key.removeprefix("ori_"): value for key, value in tensors.items() if key.startswith("ori_")}}

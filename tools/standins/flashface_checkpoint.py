"""The stand-in for FlashFace: the keys and layout of the published file, for a UNet of any width."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shape = tuple[int, ...]

# ComfyUI's keys -> the published keys, applied in order.
NAME_REPLACEMENTS = (
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
SHARED_PREFIXES = ("time_embedding.", "head.")


def to_published_name(name: str) -> str:
    """The published key of a tensor of ComfyUI's UNet."""
    for pattern, new in NAME_REPLACEMENTS:
        name = re.sub(pattern, new, name)
    return name


def get_flashface_shapes(unet_shapes: Mapping[str, Shape], input_channels: int) -> dict[str, Shape]:
    """The shapes of a FlashFace file for a UNet with these shapes and 4 input channels, without alias keys.

    `input_channels`: of the denoising UNet, 5 with the face position, 9 for inpainting.
    """
    plain = {to_published_name(key): tuple(shape) for key, shape in unet_shapes.items()}
    out = {key: shape for key, shape in plain.items() if key.startswith(SHARED_PREFIXES)}
    rest = {key: shape for key, shape in plain.items() if key not in out}
    out |= {f"ori_{key}": shape for key, shape in rest.items()} | {f"ref_{key}": shape for key, shape in rest.items()}
    first = "ori_encoder.0.weight"
    out[first] = (out[first][0], input_channels, *out[first][2:])
    for key, shape in rest.items():
        if ".self_attn." in key and not key.startswith("encoder."):
            out[f"ori_{key.replace('.self_attn.', '.self_attn.self_attn_first.')}"] = shape
    return out


def add_alias_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Add the alias keys of the published file for the denoising UNet."""
    return {**tensors, **{key.removeprefix("ori_"): value for key, value in tensors.items() if key.startswith("ori_")}}

"""What FLUX's stand-ins consist of: a short model of FLUX.1's own kind, and adapters cut to fit one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

HIDDEN, TEXT = 3072, 4096  # of the published model and of what its adapters' keys read
FLUX: dict[str, Any] = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 768, "hidden_size": 256,
    "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 4, "axes_dim": [16, 56, 56], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
OMNI_WIDTH, OMNI_TOKENS = 1280, 256


def fitted(layout: Shapes, config: Mapping[str, Any] = FLUX, text: int = TEXT) -> dict[str, tuple[int, ...]]:
    """The shapes of a published adapter's file for a FLUX of other sizes, whose keys read tokens `text` wide."""
    doubles, singles = config["depth"], config["depth_single_blocks"]
    last = {
        "double_blocks": doubles, "ip_adapter": doubles + singles,
        "pulid_ca": -(-doubles // 2) + -(-singles // 4),  # behind every second and every fourth
    }  # fmt: skip
    out: dict[str, tuple[int, ...]] = {}
    for key, shape in layout.items():
        match = re.match(r"(double_blocks|ip_adapter|pulid_ca)\.(\d+)\.", key)
        if match is None or int(match[2]) < last[match[1]]:
            cut = tuple(config["hidden_size"] if match and size == HIDDEN else size for size in shape)
            out[key] = tuple(size // TEXT * text if size % TEXT == 0 else size for size in cut)
    return out


def omni_id(config: Mapping[str, Any] = FLUX) -> dict[str, tuple[int, ...]]:
    """The shapes of an Omni-ID adapter of the pack's own, in every block."""
    sides = (("double_blocks", config["depth"]), ("single_blocks", config["depth_single_blocks"]))
    names = [f"{side}.{i}" for side, count in sides for i in range(count)]
    return {f"layers.{name}.{part}.weight": (config["hidden_size"], OMNI_WIDTH) for name in names for part in "kv"}


def omni_id_sd15(hidden: int, text: int = 768, attentions: int = 16) -> dict[str, tuple[int, ...]]:
    """The same for SD1.5, with a projector from the tokens to the text's width."""
    shapes: dict[str, tuple[int, ...]] = {
        "projector.proj.weight": (text, OMNI_WIDTH), "projector.proj.bias": (text,),
        "projector.norm.weight": (text,), "projector.norm.bias": (text,),
    }  # fmt: skip
    return shapes | {f"layers.{2 * n + 1}.{part}.weight": (hidden, text) for n in range(attentions) for part in "kv"}


def pooling_head(width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The shapes of SigLIP's pooling head in the transformers layout."""
    shapes: dict[str, tuple[int, ...]] = {
        "probe": (1, 1, width), "attention.in_proj_weight": (3 * width, width), "attention.in_proj_bias": (3 * width,),
        "attention.out_proj.weight": (width, width), "attention.out_proj.bias": (width,), "layernorm.weight": (width,),
        "layernorm.bias": (width,), "mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    return {f"vision_model.head.{key}": shape for key, shape in shapes.items()}

"""The stand-ins for FLUX: a small model with the FLUX.1 architecture, and adapters reduced to its size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

FLUX_HIDDEN_SIZE, TEXT_WIDTH = 3072, 4096  # of the published model, and of its adapters' tokens
FLUX_CONFIG: dict[str, Any] = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 768, "hidden_size": 256,
    "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 4, "axes_dim": [16, 56, 56], "theta": 10000,
    "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
OMNI_ID_TOKEN_WIDTH, NUM_OMNI_ID_TOKENS = 1280, 256


def fit_adapter_shapes(
    layout: Shapes, config: Mapping[str, Any] = FLUX_CONFIG, text_width: int = TEXT_WIDTH
) -> dict[str, tuple[int, ...]]:
    """The shapes of a published adapter file, changed to fit a FLUX model of this config and tokens of `text_width`."""
    doubles, singles = config["depth"], config["depth_single_blocks"]
    num_layers = {
        "double_blocks": doubles, "ip_adapter": doubles + singles,
        "pulid_ca": -(-doubles // 2) + -(-singles // 4),  # after every second double and every fourth single block
    }  # fmt: skip
    out: dict[str, tuple[int, ...]] = {}
    for key, shape in layout.items():
        match = re.match(r"(double_blocks|ip_adapter|pulid_ca)\.(\d+)\.", key)
        if match is None or int(match[2]) < num_layers[match[1]]:
            fitted = tuple(config["hidden_size"] if match and size == FLUX_HIDDEN_SIZE else size for size in shape)
            out[key] = tuple(size // TEXT_WIDTH * text_width if size % TEXT_WIDTH == 0 else size for size in fitted)
    return out


def get_omni_id_flux_shapes(config: Mapping[str, Any] = FLUX_CONFIG) -> dict[str, tuple[int, ...]]:
    """The shapes of a native Omni-ID adapter with keys and values in every block."""
    sides = (("double_blocks", config["depth"]), ("single_blocks", config["depth_single_blocks"]))
    names = [f"{side}.{i}" for side, count in sides for i in range(count)]
    return {
        f"layers.{name}.{part}.weight": (config["hidden_size"], OMNI_ID_TOKEN_WIDTH) for name in names for part in "kv"
    }


def get_omni_id_sd15_shapes(
    hidden_width: int, text_width: int = 768, num_attentions: int = 16
) -> dict[str, tuple[int, ...]]:
    """The shapes of a native Omni-ID adapter for SD1.5, with a projector from the tokens to the text width."""
    shapes: dict[str, tuple[int, ...]] = {
        "projector.proj.weight": (text_width, OMNI_ID_TOKEN_WIDTH), "projector.proj.bias": (text_width,),
        "projector.norm.weight": (text_width,), "projector.norm.bias": (text_width,),
    }  # fmt: skip
    return shapes | {
        f"layers.{2 * n + 1}.{part}.weight": (hidden_width, text_width) for n in range(num_attentions) for part in "kv"
    }


def get_pooling_head_shapes(width: int, mlp_width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of SigLIP's pooling head in the transformers layout."""
    shapes: dict[str, tuple[int, ...]] = {
        "probe": (1, 1, width), "attention.in_proj_weight": (3 * width, width), "attention.in_proj_bias": (3 * width,),
        "attention.out_proj.weight": (width, width), "attention.out_proj.bias": (width,), "layernorm.weight": (width,),
        "layernorm.bias": (width,), "mlp.fc1.weight": (mlp_width, width), "mlp.fc1.bias": (mlp_width,),
        "mlp.fc2.weight": (width, mlp_width), "mlp.fc2.bias": (width,),
    }  # fmt: skip
    return {f"vision_model.head.{key}": shape for key, shape in shapes.items()}

"""A small CLIP image encoder in two layouts: OpenCLIP's checkpoint and ComfyUI's CLIP_VISION."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import comfy.clip_vision
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor

IMAGE_SIZE, PATCH_SIZE, TOWER_WIDTH, NUM_HEADS, NUM_LAYERS, MLP_WIDTH, PROJECTION_WIDTH = 56, 14, 128, 4, 3, 320, 48
ARCHITECTURE_KEY = (TOWER_WIDTH, NUM_LAYERS, PATCH_SIZE, IMAGE_SIZE)  # a key of clip_vision.VIT_ARCHITECTURES
CLIP_VISION_CONFIG: dict[str, Any] = {
    "hidden_size": TOWER_WIDTH, "intermediate_size": MLP_WIDTH, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE,
    "projection_dim": PROJECTION_WIDTH, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_channels": 3,
    "model_type": "clip_vision_model",
}  # fmt: skip


def make_open_clip_tower(seed: int = 0, quick_gelu: bool = False) -> VisionTransformer:
    torch.manual_seed(seed)
    layer = QuickGELU if quick_gelu else torch.nn.GELU
    ratio = MLP_WIDTH / TOWER_WIDTH
    tower = VisionTransformer(
        IMAGE_SIZE, PATCH_SIZE, TOWER_WIDTH, NUM_LAYERS, NUM_HEADS, ratio, output_dim=PROJECTION_WIDTH, act_layer=layer
    )
    for weight in tower.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return tower.eval().requires_grad_(False)


def make_open_clip_checkpoint(tower: VisionTransformer, prefix: str = "") -> dict[str, Tensor]:
    """A checkpoint as OpenCLIP saves it: the vision tower, and tensors of the text tower that loaders ignore."""
    weights = {f"{prefix}visual.{key}": value.contiguous() for key, value in tower.state_dict().items()}
    return weights | {f"{prefix}logit_scale": torch.ones(()), f"{prefix}token_embedding.weight": torch.ones(7, 4)}


def make_clip_vision(weights: dict[str, Tensor], **changes: Any) -> comfy.clip_vision.ClipVisionModel:
    """A CLIP_VISION in float32."""
    with tempfile.TemporaryDirectory() as folder:  # older versions of ComfyUI only read a file
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**CLIP_VISION_CONFIG, **changes}))
        vision = comfy.clip_vision.ClipVisionModel(str(path))
    vision.model.float()
    missing, unexpected = vision.load_sd(weights)
    assert not missing and not [key for key in unexpected if key.startswith(("vision_model", "visual"))]
    return vision


def convert_to_clip_vision(tower: VisionTransformer) -> comfy.clip_vision.ClipVisionModel:
    """The same network as ComfyUI loads it."""
    weights = {
        key.removeprefix("visual."): value for key, value in make_open_clip_checkpoint(tower).items() if "visual" in key
    }
    return make_clip_vision(comfy.clip_vision.convert_to_transformers(weights, ""))

"""Tiny CLIP image encoders of one network in both layouts: OpenCLIP's, and the host's own CLIP_VISION."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import comfy.clip_vision
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor

SIZE, PATCH, WIDTH, HEADS, LAYERS, INNER, OUT = 56, 14, 128, 4, 3, 320, 48
NUMBERS = (WIDTH, LAYERS, PATCH, SIZE)  # as likeness.clip.ARCHITECTURES has them
CONFIG: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "image_size": SIZE, "patch_size": PATCH, "projection_dim": OUT, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    "num_channels": 3, "model_type": "clip_vision_model",
}  # fmt: skip


def open_clip(seed: int = 0, quick: bool = False) -> VisionTransformer:
    torch.manual_seed(seed)
    layer = QuickGELU if quick else torch.nn.GELU
    ratio = INNER / WIDTH
    tower = VisionTransformer(SIZE, PATCH, WIDTH, LAYERS, HEADS, ratio, output_dim=OUT, act_layer=layer)
    for weight in tower.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return tower.eval().requires_grad_(False)


def checkpoint(tower: VisionTransformer, prefix: str = "") -> dict[str, Tensor]:
    """What OpenCLIP would save: the tower, and parts of a text tower that are none of our business."""
    weights = {f"{prefix}visual.{key}": value.contiguous() for key, value in tower.state_dict().items()}
    return weights | {f"{prefix}logit_scale": torch.ones(()), f"{prefix}token_embedding.weight": torch.ones(7, 4)}


def host(weights: dict[str, Tensor], **changes: Any) -> comfy.clip_vision.ClipVisionModel:
    """A CLIP_VISION of the host in float32."""
    with tempfile.TemporaryDirectory() as folder:  # older hosts read a file, and nothing else
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({**CONFIG, **changes}))
        vision = comfy.clip_vision.ClipVisionModel(str(path))
    vision.model.float()
    missing, unexpected = vision.load_sd(weights)
    assert not missing and not [key for key in unexpected if key.startswith(("vision_model", "visual"))]
    return vision


def twin(tower: VisionTransformer) -> comfy.clip_vision.ClipVisionModel:
    """The same network as the host loads it."""
    weights = {key.removeprefix("visual."): value for key, value in checkpoint(tower).items() if "visual" in key}
    return host(comfy.clip_vision.convert_to_transformers(weights, ""))

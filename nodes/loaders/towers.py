"""Vision transformers of OpenCLIP's, through open_clip_torch: the architecture is read from the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...likeness import clip


@dataclass(frozen=True, eq=False)
class Tower:
    """`module` is open_clip's VisionTransformer, without weights; `name` as in encoder ids; `size` in pixels."""

    module: nn.Module
    name: str
    size: int


def build(weights: Mapping[str, Tensor], file: str, expected: str, activation: str = "auto") -> Tower:
    """The tower that has these weights, named as below OpenCLIP's `visual.`.

    `activation` is `gelu`, `quick_gelu`, or `auto`, by the names of architecture and file. Raises ValueError, which
    says what was `expected` where weights are missing.
    """
    try:
        from open_clip.transformer import QuickGELU, VisionTransformer
    except ImportError as error:
        raise ValueError(
            f"got no open_clip ({error}); expected open_clip_torch beside ComfyUI; "
            "run pip install -r requirements.txt in this pack's folder with ComfyUI's Python"
        ) from error
    try:
        width, _, patch, _ = weights["conv1.weight"].shape
        positions = weights["positional_embedding"].shape[0]
        inner = weights["transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
        layers = len({key.split(".")[2] for key in weights if key.startswith("transformer.resblocks.")})
        embed = weights["proj"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"got {file}, which misses {error}; expected {expected}") from error
    size = round((positions - 1) ** 0.5) * patch
    heads = width // clip.HEAD_WIDTHS.get(width, 64)
    name = clip.architecture(width, layers, patch, size)
    quick = clip.is_quick(name, Path(file).name) if activation == "auto" else activation == "quick_gelu"
    ratio = (inner + 0.5) / width  # it comes back as int(width * ratio)
    act_layer = QuickGELU if quick else nn.GELU
    with torch.device("meta"):
        module = VisionTransformer(size, patch, width, layers, heads, ratio, output_dim=embed, act_layer=act_layer)
    return Tower(module, name, size)

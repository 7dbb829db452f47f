"""Infinite-ID for the tests: adapters from seeds in the pack's own layout, identities for them, the node."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness import infinite_id
from comfyui_likeness.likeness.spec import AdapterSpec, Identity
from comfyui_likeness.nodes.attention.mixed import ApplyMixed
from comfyui_likeness.nodes.attention.unet import sites
from comfyui_likeness.nodes.loaders import own as loader
from comfyui_likeness.nodes.types import LoadedAdapter
from identities import identity
from models import patcher
from torch import Tensor

TOKENS = 4


def tensors(family: str = "SD1.5", seed: int = 0) -> dict[str, Tensor]:
    """A file's tensors under their names."""
    found = sites(patcher(family).model.diffusion_model)
    width = found[0].context
    shapes: dict[str, tuple[int, ...]] = {
        "projector.clip.0.weight": (1280,), "projector.clip.0.bias": (1280,),
        "projector.clip.1.weight": (width, 1280), "projector.clip.1.bias": (width,),
        "projector.face.proj.0.weight": (64, 512), "projector.face.proj.0.bias": (64,),
        "projector.face.proj.2.weight": (TOKENS * width, 64), "projector.face.proj.2.bias": (TOKENS * width,),
        "projector.face.norm.weight": (width,), "projector.face.norm.bias": (width,),
    }  # fmt: skip
    for site in found:
        shapes |= {f"layers.{site.number}.{part}.weight": (site.hidden, width) for part in "kv"}
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for key, shape in shapes.items()}


def told(family: str = "SD1.5", unconditional: str = "zero") -> dict[str, Any]:
    spec = AdapterSpec(infinite_id.KIND, family, 0, 0, (), infinite_id.NEEDS, unconditional=unconditional)
    return json.loads(infinite_id.metadata(spec, infinite_id.CLIP_TOKENS, {"steps": 1})["likeness"])


def adapter(family: str = "SD1.5", seed: int = 0, unconditional: str = "zero") -> LoadedAdapter:
    return loader.load(tensors(family, seed), told(family, unconditional), f"infinite {seed}")[0]


def person(seed: int = 0, faces: int = 1) -> Identity:
    return identity(infinite_id.NEEDS, ((512,), (257, 1280)), faces, seed)


SETTINGS: dict[str, Any] = {
    "strength": 1.0, "style": "none", "attention": "mixed", "text_stream": "own", "start_percent": 0.0,
    "end_percent": 1.0,
}  # fmt: skip


def mixed(model: ModelPatcher, given: LoadedAdapter | None = None, who: Any = None, **changes: Any) -> ModelPatcher:
    """The model with people in it, by the node."""
    return ApplyMixed.execute(model, given or adapter(), who or person(), **{**SETTINGS, **changes}).args[0]

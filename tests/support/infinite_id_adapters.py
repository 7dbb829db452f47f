"""Infinite-ID for tests: random adapters in the native format, identities for them, the Apply node."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.methods import infinite_id
from comfyui_likeness.likeness.spec import AdapterSpec, Identity
from comfyui_likeness.nodes.attention.apply_mixed import ApplyMixed
from comfyui_likeness.nodes.attention.unet_layers import list_unet_layers
from comfyui_likeness.nodes.loaders import native_adapters
from comfyui_likeness.nodes.types import LoadedAdapter
from torch import Tensor

from support.host_models import make_small_model
from support.identities import make_identity

NUM_FACE_TOKENS = 4


def make_infinite_id_tensors(family: str = "SD1.5", seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a file, by name."""
    layers = list_unet_layers(make_small_model(family).model.diffusion_model)
    width = layers[0].context_dim
    shapes: dict[str, tuple[int, ...]] = {
        "projector.clip.0.weight": (1280,), "projector.clip.0.bias": (1280,),
        "projector.clip.1.weight": (width, 1280), "projector.clip.1.bias": (width,),
        "projector.face.proj.0.weight": (64, 512), "projector.face.proj.0.bias": (64,),
        "projector.face.proj.2.weight": (NUM_FACE_TOKENS * width, 64),
        "projector.face.proj.2.bias": (NUM_FACE_TOKENS * width,),
        "projector.face.norm.weight": (width,), "projector.face.norm.bias": (width,),
    }  # fmt: skip
    for layer in layers:
        shapes |= {f"layers.{layer.file_index}.{part}.weight": (layer.hidden_size, width) for part in "kv"}
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for key, shape in shapes.items()}


def make_infinite_id_metadata(family: str = "SD1.5", unconditional: str = "zero") -> dict[str, Any]:
    spec = AdapterSpec(infinite_id.KIND, family, 0, 0, (), infinite_id.PAPER_FEATURES, unconditional=unconditional)
    return json.loads(
        infinite_id.make_infinite_id_metadata(spec, infinite_id.NUM_CLIP_TOKENS, {"steps": 1})["likeness"]
    )


def make_infinite_id_adapter(family: str = "SD1.5", seed: int = 0, unconditional: str = "zero") -> LoadedAdapter:
    return native_adapters.load_native_adapter(
        make_infinite_id_tensors(family, seed), make_infinite_id_metadata(family, unconditional), f"infinite {seed}"
    )[0]


def make_infinite_id_identity(seed: int = 0, faces: int = 1) -> Identity:
    return make_identity(infinite_id.PAPER_FEATURES, ((512,), (257, 1280)), faces, seed)


APPLY_MIXED_DEFAULTS: dict[str, Any] = {
    "strength": 1.0, "style": "none", "attention": "mixed", "text_stream": "own", "start_percent": 0.0,
    "end_percent": 1.0,
}  # fmt: skip


def apply_infinite_id(
    model: ModelPatcher, loaded_adapter: LoadedAdapter | None = None, identity_or_people: Any = None, **changes: Any
) -> ModelPatcher:
    """The model with people applied by the node."""
    return ApplyMixed.execute(
        model,
        loaded_adapter or make_infinite_id_adapter(),
        identity_or_people or make_infinite_id_identity(),
        **{**APPLY_MIXED_DEFAULTS, **changes},
    ).args[0]

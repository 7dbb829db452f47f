"""Fused KV for tests: random adapters in the native format, people, a VAE, the Apply node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.spec import FusedKVSpec, Identity, Person
from comfyui_likeness.nodes.attention.apply_fused import ApplyFused
from comfyui_likeness.nodes.attention.unet_layers import list_unet_layers
from comfyui_likeness.nodes.loaders import fused_kv_loader
from comfyui_likeness.nodes.types import LoadedFusedKV
from torch import Tensor

from support.host_models import MODEL_FAMILIES, make_conditioning, make_small_model
from support.identities import make_identity

FACE_SIZE = 64  # pixels of a face image


class PixelVAE:
    """A VAE whose latents depend on the contrast of each 8 x 8 block of pixels."""

    def encode(self, images: Tensor) -> Tensor:
        contrast = images.mean(dim=-1).unfold(1, 8, 8).unfold(2, 8, 8).flatten(-2).std(dim=-1)
        return torch.stack([(contrast * (3 + c) * 7).sin() for c in range(4)], 1)


def make_fused_kv_tensors(family: str = "SD1.5", seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a file, by name."""
    generator = torch.Generator().manual_seed(seed)
    out = {"text.hidden": torch.randn(7, MODEL_FAMILIES[family][0]["context_dim"], generator=generator)}
    if family == "SDXL":
        out["text.pooled"] = torch.randn(1, 1280, generator=generator)
    for layer in list_unet_layers(make_small_model(family).model.diffusion_model):
        for part in "kv":
            weight = torch.randn(layer.hidden_size, layer.hidden_size, generator=generator) / layer.hidden_size**0.5
            out[f"{layer.module_path}.attn2.to_{part}_f.weight"] = weight
    return out


def make_fused_kv_spec(
    weights: dict[str, Tensor], family: str = "SD1.5", stream_noise: str = "clean", face_size: int = FACE_SIZE
) -> FusedKVSpec:
    layers = {key.partition(".attn2.")[0]: len(value) for key, value in weights.items() if ".attn2." in key}
    return FusedKVSpec(family, stream_noise, face_size, layers, {"steps": 1})


def make_fused_kv_adapter(family: str = "SD1.5", seed: int = 0, stream_noise: str = "clean") -> LoadedFusedKV:
    tensors = make_fused_kv_tensors(family, seed)
    return fused_kv_loader.make_loaded_fused_kv(
        make_fused_kv_spec(tensors, family, stream_noise), tensors, f"fused {seed}"
    )


def make_zero_shot_adapter(model: ModelPatcher, family: str = "SD1.5", stream_noise: str = "clean") -> LoadedFusedKV:
    spec, weights = fused_kv_loader.make_zero_shot_fused_kv(model, make_conditioning(3, family), stream_noise)
    return fused_kv_loader.make_loaded_fused_kv(replace(spec, face_size=FACE_SIZE), weights, "zero shot")


def make_fused_kv_identity(seed: int = 0, faces: int = 1) -> Identity:
    """An identity with face crops only, of the size FACE_SIZE."""
    generator = torch.Generator().manual_seed(seed)
    crop = torch.randint(0, 256, (faces, FACE_SIZE, FACE_SIZE, 3), generator=generator, dtype=torch.uint8)
    return replace(make_identity((), (), faces, seed), crop=crop)


def make_stripe_masks(height: int = 64, width: int = 64, count: int = 2) -> list[Tensor]:
    """Vertical stripes of an image, from left to right, as masks [1, H, W]."""
    edges = [round(i * width / count) for i in range(count + 1)]
    masks = [torch.zeros(1, height, width) for _ in range(count)]
    for mask, left, right in zip(masks, edges, edges[1:], strict=False):
        mask[:, :, left:right] = 1
    return masks


def make_people(masks: Sequence[Tensor | None], **changes: Any) -> tuple[Person, ...]:
    return tuple(Person(make_fused_kv_identity(seed=i), mask, **changes) for i, mask in enumerate(masks))


APPLY_FUSED_DEFAULTS: dict[str, Any] = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "outside": "all"}


def apply_fused_kv(
    model: ModelPatcher, loaded_adapter: LoadedFusedKV | None = None, identity_or_people: Any = None, **changes: Any
) -> ModelPatcher:
    """The model with people applied by the node."""
    loaded_adapter = loaded_adapter or make_fused_kv_adapter()
    return ApplyFused.execute(
        model,
        loaded_adapter,
        identity_or_people or make_fused_kv_identity(),
        PixelVAE(),
        **{**APPLY_FUSED_DEFAULTS, **changes},
    ).args[0]

"""Base models, a VAE and identities with random content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..likeness.spec import Feature, Identity
from ..tools.standins import models

BASE_CONFIGS: dict[str, dict[str, Any]] = {"sd15": models.SD15_CONFIG, "sdxl": models.SDXL_CONFIG}
FULL_CONFIGS = {"sd15": {"channel_mult": [1, 2, 4, 4]}, "sdxl": {"channel_mult": [1, 2, 4]}}


def build_unet_model(base: str, size: str) -> ModelPatcher:
    """A UNet with random weights: 320 channels at every level (`small`), or as published (`full`)."""
    config = BASE_CONFIGS[base] | (FULL_CONFIGS[base] if size == "full" else {})
    supported = {"sd15": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[base]
    settings = supported({key: value for key, value in config.items() if key != "dims"})
    dtype = choose_dtype(torch.float16)
    settings.set_inference_dtype(dtype, None)
    model_class = {"sd15": comfy.model_base.BaseModel, "sdxl": comfy.model_base.SDXL}[base]
    return fill_model(model_class(settings, device=torch.device("cpu")), dtype)


def choose_dtype(gpu_dtype: torch.dtype) -> torch.dtype:
    """`gpu_dtype` on a GPU, else float32."""
    return gpu_dtype if comfy.model_management.get_torch_device().type == "cuda" else torch.float32


def fill_model(model: Any, dtype: torch.dtype) -> ModelPatcher:
    """Fill a ComfyUI model's diffusion model with random weights."""
    shapes = {key: tuple(value.shape) for key, value in model.diffusion_model.state_dict().items()}
    model.diffusion_model.load_state_dict(models.fill_shapes(shapes, dtype), assign=True)
    model.diffusion_model.eval().requires_grad_(False)
    return ModelPatcher(model, comfy.model_management.get_torch_device(), torch.device("cpu"))


class RandomLatentVAE:
    """A VAE whose images have random latents."""

    def encode(self, images: Tensor) -> Tensor:
        size = (len(images), 4, images.shape[1] // 8, images.shape[2] // 8)
        return torch.randn(size, generator=torch.Generator().manual_seed(1)) / 0.18215


def make_random_identity(
    shapes: Mapping[Feature, tuple[int, ...]], num_faces: int = 1, crop: Tensor | None = None
) -> Identity:
    """An identity with random embeddings of these shapes per face."""
    embeddings = {feature.format_encoder_id("0" * 64): torch.randn(num_faces, *shapes[feature]) for feature in shapes}
    return Identity(
        name="someone",
        box=torch.tensor([[128.0, 128.0, 384.0, 384.0]]).repeat(num_faces, 1),
        kps=torch.ones(num_faces, 5, 2),
        score=torch.ones(num_faces),
        weight=torch.ones(num_faces),
        crop=crop,
        embeddings=embeddings,
        zero_embeddings={key: value[:1] for key, value in embeddings.items()},
    )
